"""A rollout actor: one vLLM engine that samples groups, has them scored and commits them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import xxhash

from actors.engine import engine_args
from uniapl.config import Config
from uniapl.records import Group, Prompt, Sample, VersionSpan
from uniapl.rewards.types import ScoreRequest

LEASE_WAIT_S = 5.0


class RolloutActor:
    """One engine. All methods are coroutines of one Ray actor.

    Args:
        name: of this actor, in leases, groups and errors.
        config: of the run.
        gpu: whether the engine runs on a GPU.
    """

    def __init__(self, name: str, config: Config, gpu: bool) -> None:
        self._name = name
        self._config = config
        self._gpu = gpu
        self._queue: Any = None
        self._reward: Any = None
        self._engine: Any = None
        self._stopping = False
        self._requests = 0

    async def start(self) -> float:
        """Load the engine; returns the seconds it took."""
        from vllm.v1.engine.async_llm import AsyncLLM

        began = time.monotonic()
        self._engine = AsyncLLM.from_engine_args(engine_args(self._config, self._gpu))
        await self._engine.update_weight_version("0")
        await self.generate([1, 2, 3], n=1, temperature=1.0, max_tokens=2, seed=0)
        return time.monotonic() - began

    async def attach(self, queue: Any, reward: Any) -> None:
        """Handles of the queue actor and of the reward service, before `run` and `evaluate`."""
        self._queue = queue
        self._reward = reward

    async def run(self) -> int:
        """Lease, generate, score and commit until `stop()`; returns the number of groups committed."""
        if self._config.queue.max_staleness == 0:
            return await self._produce_rounds()
        loops = [self._produce() for _ in range(self._config.rollout.groups_in_flight)]
        return sum(await asyncio.gather(*loops))

    async def stop(self) -> None:
        """End `run()` after the groups in flight."""
        self._stopping = True

    async def shutdown(self) -> None:
        """End the engine and its processes."""
        self._stopping = True
        if self._engine is not None:
            self._engine.shutdown()

    async def _produce(self) -> int:
        committed = 0
        while not self._stopping:
            lease = await self._queue.lease.remote(self._name, LEASE_WAIT_S)
            if lease is not None:
                began = time.monotonic()
                committed += await self._answer(lease, await self._submit_lease(lease), began)
        return committed

    async def _produce_rounds(self) -> int:
        """Strictly synchronous: what the engine computes together does not depend on timing.

        A logit's last bits depend on what else is in the batch. So all of a round enters a paused engine, in
        order, and the engine's steps then follow from the round alone.
        """
        committed = 0
        while not self._stopping:
            leases = await self._queue.lease_round.remote(self._name, LEASE_WAIT_S)
            if leases:
                began = time.monotonic()
                streams = await self._submit_together(leases)
                answers = [self._answer(lease, s, began) for lease, s in zip(leases, streams, strict=True)]
                committed += sum(await asyncio.gather(*answers))
        return committed

    async def _submit_together(self, leases: list[Any]) -> list[Any]:
        """Requests of all leases, none of which runs before the last one is there; nothing is cached before."""
        await self._engine.pause_generation(mode="keep", clear_cache=False)
        try:
            await self._engine.reset_prefix_cache()
            return [await self._submit_lease(lease) for lease in leases]
        finally:
            await self._engine.resume_generation()

    async def _answer(self, lease: Any, stream: Any, began: float) -> bool:
        """Commit the group of a lease, or give the lease back; whether it was committed."""
        group = await self._make_group(lease, stream, began)
        if group is None:
            await self._queue.release.remote(lease.id, "aborted for new weights")
            return False
        return await self._queue.commit.remote(lease.id, group)

    async def _make_group(self, lease: Any, stream: Any, began: float) -> Group | None:
        """None where `rollout.update_mode: abort` ended a response before it was whole."""
        samples = await self._collect(stream)
        if any(sample.finish_reason == "abort" for sample in samples):
            return None
        generated = time.monotonic()
        await self._score(lease.prompt, samples)
        done = time.monotonic()
        return Group(lease.id, lease.prompt, samples, self._name, generated - began, done - generated)

    async def _submit_lease(self, lease: Any) -> Any:
        r, seed = self._config.rollout, self._seed(lease.sequence, lease.attempt)
        return await self._submit(lease.prompt.token_ids, r.group_size, r.temperature, r.max_tokens, seed)

    def _seed(self, sequence: int, attempt: int) -> int:
        """The sampler's seed is the run's, the lease's place and the attempt's: not this actor's."""
        return xxhash.xxh32_intdigest(f"{self._config.run.seed}/{sequence}/{attempt}".encode()) >> 1

    async def generate(
        self, prompt_ids: list[int], n: int, temperature: float, max_tokens: int, seed: int
    ) -> list[Sample]:
        """n responses to one prompt, with the log-probabilities that the sampler used."""
        return await self._collect(await self._submit(prompt_ids, n, temperature, max_tokens, seed))

    async def _submit(self, prompt_ids: list[int], n: int, temperature: float, max_tokens: int, seed: int) -> Any:
        """Hand a request to the engine; returns where its output will be."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        r = self._config.rollout
        params = SamplingParams(
            n=n,
            temperature=temperature,
            top_p=r.top_p,
            top_k=r.top_k,
            max_tokens=max_tokens,
            seed=seed,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._requests += 1
        request_id = f"{self._name}-{self._requests}"
        return await self._engine.add_request(request_id, {"prompt_token_ids": prompt_ids}, params)

    async def _collect(self, stream: Any) -> list[Sample]:
        """The samples of a request, in their order, when all of them are whole."""
        final = await stream.get()
        while not final.finished:
            final = await stream.get()
        return [_sample(completion) for completion in sorted(final.outputs, key=lambda c: c.index)]

    async def _score(self, prompt: Prompt, samples: list[Sample]) -> None:
        scores = await self._reward.score.remote(ScoreRequest(prompt, [s.text for s in samples]))
        for sample, score in zip(samples, scores, strict=True):
            sample.score = score

    async def evaluate(self, prompts: list[Prompt], samples: int, temperature: float) -> list[Group]:
        """Scored samples of held-out prompts, outside of the queue."""

        async def one(number: int, prompt: Prompt) -> Group:
            made = await self.generate(
                prompt.token_ids, samples, temperature, self._config.rollout.max_tokens, self._seed(-1 - number, 0)
            )
            await self._score(prompt, made)
            return Group(-1, prompt, made, self._name)

        return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))

    # The four calls of vLLM's weight-sync protocol, driven by the learner's rank 0.

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def start_weight_update(self) -> None:
        """Hold back what is running, as `rollout.update_mode` says, and open the update."""
        await self._engine.pause_generation(mode=self._config.rollout.update_mode, clear_cache=False)
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_weight_update(self, version: int) -> tuple[int, str]:
        """Load what was received, forget what was computed with older weights, and go on.

        Returns:
            the version now held and the checksum of the bytes received.
        """
        await self._engine.finish_weight_update(str(version))
        await self._engine.reset_prefix_cache(reset_running_requests=True)
        digests = await self._engine.collective_rpc("received_digest")
        held = int(await self._engine.get_weight_version())
        await self._engine.resume_generation()
        return held, digests[0]


def _sample(completion: Any) -> Sample:
    ids = list(completion.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(ids, completion.logprobs, strict=True)]
    spans = completion.weight_versions or []
    versions = [VersionSpan(s.start, s.end, int(s.version)) for s in spans]
    return Sample(ids, logprobs, versions, completion.text, completion.finish_reason)
