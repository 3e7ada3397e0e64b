"""A real rollout actor whose real engine process can be told to die at a certain moment of a weight broadcast."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from typing import Any

from actors import rollout
from actors.weight_receiver import WorkerExtension

ENGINE_ARGS = rollout.engine_args


class MortalWorker(WorkerExtension):
    """In vLLM's engine process."""

    def die_when_receiving(self) -> bool:
        """Have SIGKILL end this process in the middle of the next update, with some of its layers loaded."""
        model = self.weight_transfer_engine.model
        load = model.load_weights

        def load_some(weights: Iterable[Any]) -> Any:
            def some() -> Iterable[Any]:
                for count, weight in enumerate(weights):
                    if count == 5:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield weight

            return load(some())

        model.load_weights = load_some
        return True


def mortal_engine_args(*args: Any) -> Any:
    made = ENGINE_ARGS(*args)
    made.worker_extension_cls = f"{__name__}.{MortalWorker.__name__}"
    return made


class MortalRolloutActor(rollout.RolloutActor):
    """The real one with a `MortalWorker`."""

    async def start(self) -> float:
        rollout.engine_args = mortal_engine_args
        return await super().start()

    async def die_when_receiving(self) -> Any:
        return await self._engine.collective_rpc("die_when_receiving")
