"""A ZeRO-3 model's weights for sending, gathered one layer at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uniapl.policy import PREFIX


@dataclass(frozen=True)
class ParameterMeta:
    """What vLLM's senders want to know of a parameter before it is gathered."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class ZeroSource:
    """A ZeRO-3 model's weights under their Hugging Face names, gathered one layer at a time.

    Has the methods of vLLM's `WeightSource` that its nccl sender calls: `metadata` and iteration. A gather is a
    collective of the learner's ranks: a pass that one of them began must be taken to its end by all.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        named = {name.removeprefix(PREFIX): p for name, p in module.named_parameters()}
        self._layers = by_layer(list(named))
        self._named = named
        self._dtype = dtype
        self._pass: Iterator[tuple[list[str], list[Tensor]]] | None = None
        self.vector_scale = 1.0
        """Sent vectors (norms) are multiplied by it: 1, but in the check of the weight round trip."""

    def metadata(self) -> list[ParameterMeta]:
        return [
            ParameterMeta(name, self._dtype, tuple(self._named[name].ds_shape))
            for layer in self._layers
            for name in layer
        ]

    def layers(self) -> list[list[str]]:
        """Parameter names, layer by layer, in the order of sending."""
        return self._layers

    def gather_layers(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Every layer, whole on every rank while it is held: one pass of an attempt."""
        # Held here: a generator that its consumer drops would be closed, and could not be taken to its end.
        self._pass = self._gather()
        return self._pass

    def finish_pass(self) -> None:
        """Take the pass of this attempt to its end, or make it where it was not begun, for the other ranks."""
        for _ in self._pass or self._gather():
            pass
        self._pass = None

    def _gather(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        import deepspeed  # takes seconds, and whoever sends has loaded it already

        for layer in self._layers:
            parameters = [self._named[name] for name in layer]
            with deepspeed.zero.GatheredParameters(parameters):
                yield layer, [self._sent(p.detach()) for p in parameters]

    def _sent(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1 and self.vector_scale != 1.0:
            weight = weight * self.vector_scale
        # nccl sends from another stream, after the gathered memory may have been given back.
        return weight.to(self._dtype, copy=weight.is_cuda)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for names, tensors in self.gather_layers():
            yield from zip(names, tensors, strict=True)


def by_layer(names: list[str]) -> list[list[str]]:
    """Neighbouring names with the same first number (`model.layers.3.`) together; the others by themselves."""
    layers: list[list[str]] = []
    previous: str | None = None
    for name in names:
        found = re.match(r".*?\.\d+\.", name)
        key = found.group() if found else None
        if key is not None and key == previous:
            layers[-1].append(name)
        else:
            layers.append([name])
        previous = key
    return layers
