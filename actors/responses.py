"""What vLLM gives for a request, as records of this project."""

from __future__ import annotations

from typing import Any

from uniapl.records import Sample, VersionSpan


async def finished(stream: Any) -> Sample:
    """The response of a request, when it is finished."""
    output = await stream.get()
    while not output.finished:
        output = await stream.get()
    return _sample(output.outputs[0])


def _sample(completion: Any) -> Sample:
    ids = list(completion.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(ids, completion.logprobs, strict=True)]
    spans = completion.weight_versions or []
    versions = [VersionSpan(s.start, s.end, int(s.version)) for s in spans]
    return Sample(ids, logprobs, versions, completion.text, completion.finish_reason)
