"""A rollout actor: one vLLM engine that samples groups, has them scored and commits them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import xxhash

from actors.engine import engine_args
from actors.engine_process import sockets, spawned
from actors.queue_client import QueueClient
from actors.responses import finished
from actors.reward_client import RewardClient
from uniapl.config import Config
from uniapl.imports import importing
from uniapl.leases import MAX_ABORTS, NEW_WEIGHTS, STRAGGLER, Lease
from uniapl.loglines import log_lines
from uniapl.records import Group, Prompt, Sample
from uniapl.shared_paths import require_visible

WORKERS_END_S = 25.0
"""For an engine's several workers to end; vLLM kills the engine after 5 s, before it has, and shared memory stays."""
ALIVE_CHECK_S = 0.2
WATCH_S = 2.0
"""How often the engine's process is asked whether it answers at all."""

T = TypeVar("T")


class EngineDiedError(RuntimeError):
    """vLLM's engine process is gone, or gives no answer any more."""


class RolloutActor:
    """One engine. All methods are coroutines of one Ray actor.

    Args:
        name: of this actor, in leases, groups and errors.
        config: of the run.
        gpu: whether the engine runs on a GPU.
    """

    def __init__(self, name: str, config: Config, gpu: bool) -> None:
        self._name = name
        self._lines = log_lines(config.run.name, name)
        self._config = config
        self._gpu = gpu
        self._queue: Any = None
        self._reward = RewardClient()
        self._engine: Any = None
        self._stopping = self._shut_down = False
        self._requests = 0
        self._updating = False
        self._to_finish = 0
        """Groups under way that new weights must not end once more."""

    async def start(self) -> float:
        """Load the engine; returns the seconds it took.

        Raises:
            RunError: this actor's node does not see the model.
        """
        require_visible({"model.path": self._config.model.path}, self._name)
        with importing():
            from vllm.v1.engine.async_llm import AsyncLLM
        began = time.monotonic()
        with sockets():  # until it has answered: its process connects them in its own time
            with spawned():
                self._engine = AsyncLLM.from_engine_args(engine_args(self._config, self._gpu))
            await self._engine.update_weight_version("0")
            await self.generate([1, 2, 3], n=1, temperature=1.0, max_tokens=2, seed=0)
        return time.monotonic() - began

    async def attach(self, queue: Any, reward: Any) -> None:
        """Handles of the queue actor and of the reward service, before `run` and `evaluate`.

        A later handle of the reward service is asked, too, for what an earlier one has not answered yet.
        """
        self._queue = queue
        self._reward.attach(reward)

    async def run(self) -> int:
        """Lease, generate, score and commit until `stop()`; returns the groups committed, 0 after `shutdown()`.

        Raises:
            EngineDiedError: the engine's process died, or gave no answer for twice `cluster.broadcast_timeout_s`.
        """
        watch, produce = (asyncio.create_task(loop) for loop in (self._watch(), self._lease_and_commit()))
        try:
            await asyncio.wait([watch, produce], return_when=asyncio.FIRST_COMPLETED)
            return produce.result() if produce.done() else watch.result()
        except Exception:
            if self._shut_down:  # which ends the engine under what is running
                return 0
            self._raise_if_died()
            raise
        finally:
            watch.cancel()
            produce.cancel()

    async def _watch(self) -> int:
        """Ask the engine's process for an answer, now and again, for ever.

        In a broadcast it may answer late through no fault of its own, but not by more than a phase and what follows
        where another engine does not finish it.
        """
        limit = 2 * self._config.cluster.broadcast_timeout_s
        while True:
            try:
                async with asyncio.timeout(limit):
                    await self._alive(self._engine.get_weight_version())
            except TimeoutError:
                raise EngineDiedError(f"{self._name}: the engine gave no answer for {limit:g} s") from None
            await asyncio.sleep(WATCH_S)

    async def _lease_and_commit(self) -> int:
        rounds = self._config.queue.max_staleness == 0
        queue = QueueClient(self._queue, self._name, rounds)
        if rounds:
            return await self._produce_rounds(queue)
        loops = [self._produce(queue) for _ in range(self._config.rollout.groups_in_flight)]
        committed = sum(await asyncio.gather(*loops))
        await queue.close()
        return committed

    async def stop(self) -> None:
        """End `run()` after the groups in flight."""
        self._stopping = True

    async def shutdown(self) -> None:
        """End the engine and its processes."""
        self._stopping = self._shut_down = True
        if self._engine is not None:
            several = self._config.rollout.tensor_parallel > 1
            self._engine.shutdown(timeout=WORKERS_END_S if several else None)

    async def sleep(self) -> None:
        """Where `rollout.colocate` is set: leave the GPU to the learner; the weights wait in the machine's memory.

        What is cached is forgotten. On a CPU, whose memory is nobody's own, vLLM only stops generating.
        """
        await self._alive(self._engine.sleep(level=1))

    async def wake_up(self) -> None:
        """Take the GPU's memory again, before new weights come."""
        await self._alive(self._engine.wake_up())

    async def _produce(self, queue: QueueClient) -> int:
        committed = 0
        while not self._stopping:
            lease = await queue.lease()
            if lease is not None:
                began = time.monotonic()
                committed += await self._answer(queue, lease, await self._submit_lease(lease), began)
        return committed

    async def _produce_rounds(self, queue: QueueClient) -> int:
        """Strictly synchronous: what the engine computes together does not depend on timing.

        A logit's last bits depend on what else is in the batch. So all of a round enters a paused engine, in
        order, and the engine's steps then follow from the round alone.
        """
        committed = 0
        while not self._stopping:
            if leases := await queue.lease_round():
                began = time.monotonic()
                submitted = await self._submit_together(leases)
                answers = [self._answer(queue, lease, s, began) for lease, s in zip(leases, submitted, strict=True)]
                committed += sum(await asyncio.gather(*answers))
        return committed

    async def _submit_together(self, leases: list[Lease]) -> list[list[Any]]:
        """Requests of all leases, none of which runs before the last one is there; nothing is cached before."""
        await self._alive(self._engine.pause_generation(mode="keep", clear_cache=False))
        try:
            await self._alive(self._engine.reset_prefix_cache())
            return [await self._submit_lease(lease) for lease in leases]
        finally:
            await self._alive(self._engine.resume_generation())

    async def _submit_lease(self, lease: Lease) -> list[Any]:
        r, seed = self._config.rollout, self._seed(lease.sequence, lease.attempt)
        return await self._submit(lease.prompt.token_ids, r.group_size, r.temperature, r.max_tokens, seed)

    async def _answer(self, queue: QueueClient, lease: Lease, submitted: list[Any], began: float) -> bool:
        """Commit the group of a lease, or give the lease back; whether it was committed."""
        last = lease.task.aborts >= MAX_ABORTS
        self._to_finish += last
        group = await self._make_group(lease, submitted, began)
        self._to_finish -= last
        if isinstance(group, Group):
            return await queue.commit(group)
        await queue.release(lease.id, group)
        return False

    async def _make_group(self, lease: Lease, submitted: list[Any], began: float) -> Group | str:
        """The scored group, or why there is none, which is what its lease is released with."""
        r, q = self._config.rollout, self._config.queue
        samples = await self._collect(submitted, q.sampling_s)
        if any(sample.finish_reason == "abort" for sample in samples):
            return NEW_WEIGHTS
        if len(samples) < (q.min_group if q.on_straggler == "accept" else r.group_size):
            return STRAGGLER
        generated = time.monotonic()
        await self._reward.score(lease.prompt, samples)
        done = time.monotonic()
        return Group(lease.id, lease.prompt, samples, self._name, generated - began, done - generated)

    def _seed(self, sequence: int, attempt: int) -> int:
        """The sampler's seed is the run's, the lease's place and the attempt's: not this actor's."""
        return xxhash.xxh32_intdigest(f"{self._config.run.seed}/{sequence}/{attempt}".encode()) >> 1

    async def generate(
        self, prompt_ids: list[int], n: int, temperature: float, max_tokens: int, seed: int
    ) -> list[Sample]:
        """n responses to one prompt, with the log-probabilities that the sampler used."""
        return await self._collect(await self._submit(prompt_ids, n, temperature, max_tokens, seed))

    async def _submit(self, prompt_ids: list[int], n: int, temperature: float, max_tokens: int, seed: int) -> list[Any]:
        """Hand n requests to the engine; returns where their responses will be.

        Each is a request of its own, with the seed `seed + i`, as vLLM itself divides a request for n.
        """
        submitted = []
        for i in range(n):
            self._requests += 1
            params = self._sampling(temperature, max_tokens, seed + i)
            request_id = f"{self._name}-{self._requests}"
            submitted.append(await self._engine.add_request(request_id, {"prompt_token_ids": prompt_ids}, params))
        return submitted

    async def _collect(self, submitted: list[Any], timeout_s: float | None = None) -> list[Sample]:
        """The samples of requests, in their order.

        Args:
            timeout_s: then those that are not finished are ended in the engine and left out; None: no limit.
        """
        responses = [asyncio.create_task(finished(stream)) for stream in submitted]
        try:
            await asyncio.wait(responses, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            late = [stream for stream, task in zip(submitted, responses, strict=True) if not task.done()]
            for response in responses:
                response.cancel()
            await asyncio.wait(responses)
            if late and not self._engine.errored:
                await self._engine.abort([stream.request_id for stream in late], internal=True)
        return [response.result() for response in responses if not response.cancelled()]

    def _sampling(self, temperature: float, max_tokens: int, seed: int) -> Any:
        """vLLM's parameters for one response."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        r = self._config.rollout
        return SamplingParams(
            temperature=temperature,
            top_p=r.top_p,
            max_tokens=max_tokens,
            seed=seed,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def evaluate(self, prompts: list[Prompt], samples: int, temperature: float, at_once: int = 0) -> list[Group]:
        """Scored samples of held-out prompts, outside of the queue, also beside what is leased.

        Args:
            at_once: prompts that the engine works on at a time; 0: all.
        """
        places = asyncio.Semaphore(at_once or len(prompts) or 1)

        async def one(number: int, prompt: Prompt) -> Group:
            async with places:
                made = await self._generate_whole(prompt.token_ids, samples, temperature, self._seed(-1 - number, 0))
            await self._reward.score(prompt, made)
            return Group(-1, prompt, made, self._name)

        return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))

    async def _generate_whole(self, prompt_ids: list[int], n: int, temperature: float, seed: int) -> list[Sample]:
        """`generate`; what `rollout.update_mode: abort` ends is made again, the last time without an end."""
        made: list[Sample] = []
        for aborts in range(MAX_ABORTS + 1):
            last = aborts == MAX_ABORTS
            self._to_finish += last
            try:
                made = await self.generate(prompt_ids, n, temperature, self._config.rollout.max_tokens, seed)
            finally:
                self._to_finish -= last
            if not any(sample.finish_reason == "abort" for sample in made):
                break
        return made

    def _update_mode(self) -> str:
        """`rollout.update_mode`; `keep` instead of `abort` while a group runs that was ended `MAX_ABORTS` times.

        Without this bound, groups that take longer than a step would never be finished.
        """
        mode = self._config.rollout.update_mode
        return "keep" if mode == "abort" and self._to_finish else mode

    # The calls of vLLM's weight-sync protocol and `resume`, driven by the learner's rank 0 (learner/engine_client.py).

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> str:
        """Join the weight group.

        Returns:
            nothing, or why it was not formed through no fault of this engine.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        return await self._transfer(self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info)))

    async def start_weight_update(self) -> None:
        """Hold back what is running, as `rollout.update_mode` says, and open the update."""
        await self._alive(self._engine.pause_generation(mode=self._update_mode(), clear_cache=False))
        if self._updating:  # what was begun before ended with the loss of another engine
            await self._alive(self._engine.collective_rpc("abort_weight_update"))
        self._updating = True
        await self._alive(self._engine.start_weight_update())

    async def update_weights(self, update_info: dict[str, Any]) -> str:
        """Receive the weights.

        Returns:
            nothing, or why they did not come through no fault of this engine, which then waits for another update.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        return await self._transfer(self._engine.update_weights(WeightTransferUpdateRequest(update_info)))

    async def finish_weight_update(self, version: int) -> tuple[int, str]:
        """Load what was received and forget what was computed with older weights.

        Returns:
            the version now held and the checksum of the bytes received.
        """
        await self._alive(self._engine.finish_weight_update(str(version)))
        self._updating = False
        self._lines.step = version + 1
        await self._alive(self._engine.reset_prefix_cache(reset_running_requests=True))
        digests = await self._alive(self._engine.collective_rpc("received_digest"))
        # One checksum, or where workers of this engine differ all of them, which no sender has.
        return int(await self._alive(self._engine.get_weight_version())), " ".join(dict.fromkeys(digests))

    async def resume(self) -> None:
        """Go on generating, with the weights that the learner has found to be right."""
        await self._alive(self._engine.resume_generation())

    async def _transfer(self, call: Coroutine[Any, Any, None]) -> str:
        """What interrupted a collective call; an error of the engine's own is raised."""
        try:
            await self._alive(call)
        except EngineDiedError:
            raise
        except Exception:
            reasons = await self._alive(self._engine.collective_rpc("interruption"))
            if not any(reasons):
                raise
            return next(reason for reason in reasons if reason)
        return ""

    async def _alive(self, call: Coroutine[Any, Any, T]) -> T:
        """The result of a call to the engine; vLLM leaves such a call without an answer when its process dies."""
        task = asyncio.ensure_future(call)
        while not task.done():
            await asyncio.wait([task], timeout=ALIVE_CHECK_S)
            if not task.done() and self._engine.errored:
                task.cancel()
                self._raise_if_died()
        try:
            return task.result()
        except Exception:
            self._raise_if_died()
            raise

    def _raise_if_died(self) -> None:
        """An error of our own instead of vLLM's: whoever reads that one has to import vLLM, which takes 15 s."""
        if self._engine.errored:
            raise EngineDiedError(f"{self._name}: the engine's process died") from None
