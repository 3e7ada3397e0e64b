"""vLLM's nccl sender behind the interface of the gloo one: the calls in their order, and what a loss does.

There are no GPUs where this runs, so a stand-in takes nccl's place: the communicator, and the packed producer and
consumer, which broadcast on CUDA streams. vLLM's trainer and weight-transfer engine, Ray, processes and `EngineClient`
are real; the engines only keep what they are asked, and a model that keeps names takes the place of vLLM's.
`test_weight_broadcast.py` has the same with real nccl, where two GPUs are found.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from helpers_engines import LAYERS, VersionSource

from learner.engine_client import EngineClient, EnginesLostError
from learner.nccl_sender import NcclSender
from uniapl.device_digest import DeviceDigest

TIMEOUT_S = 30.0


class KeepsCalls:
    """An engine's side of the protocol without an engine."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.dies = self.tampers = False
        self.digest = ""

    def kept(self) -> list[tuple[str, Any]]:
        return self.calls

    def die_when_receiving(self) -> None:
        self.dies = True

    def change_a_weight(self) -> None:
        """On its way to this engine."""
        self.tampers = True

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> str:
        self.calls.append(("init_weight_transfer_engine", info))
        return ""

    def start_weight_update(self) -> None:
        self.calls.append(("start_weight_update", None))

    def update_weights(self, info: dict[str, Any]) -> str:
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls.append(("update_weights", info))
        came = weights(info)
        if self.tampers:
            came[1][1].view(-1)[7] += 1e-6
        digest = DeviceDigest()
        for _, tensor in came:
            digest.add(tensor)
        self.digest = digest.hexdigest()
        return ""

    def finish_weight_update(self, version: int) -> tuple[int, str]:
        self.calls.append(("finish_weight_update", version))
        return version, self.digest

    def resume(self) -> None:
        self.calls.append(("resume", None))


class Loads(torch.nn.Module):
    """Keeps the names of what it is to load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.loaded += [name for name, _ in weights]


def weights(info: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """What is sent after this announcement."""
    return [(name, weight(name, shape)) for name, shape in zip(info["names"], info["shapes"], strict=True)]


def weight(name: str, shape: Iterable[int]) -> torch.Tensor:
    """The same in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(name.encode())))


class NoNccl:
    """A communicator that sends nothing."""

    aborted = False

    def destroy(self) -> None:
        self.aborted = True


class LocalSource(VersionSource):
    """One rank: nothing to gather."""

    def _gather(self) -> Iterator[Any]:
        for names in self.layers():
            yield names, [weight(m.name, m.shape) for m in self.metadata() if m.name in names]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for names, tensors in self.gather_layers():
            yield from zip(names, tensors, strict=True)


@pytest.fixture
def engines(ray_session: Any) -> Iterator[list[Any]]:
    made = [ray_session.remote(KeepsCalls).options(num_cpus=0).remote() for _ in range(2)]
    ray_session.get([engine.kept.remote() for engine in made])  # they are up, before a deadline runs
    yield made
    for engine in made:
        ray_session.kill(engine)


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> tuple[NoNccl, list[str]]:
    """The communicator, and the names of what was sent through it."""
    from vllm.distributed.weight_transfer import nccl_engine

    communicator, sent = NoNccl(), []

    def produce(iterator: Iterable[tuple[str, torch.Tensor]], **_: Any) -> None:
        sent.extend(name for name, _tensor in iterator)

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda _: communicator)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", produce)
    return communicator, sent


def received(info: dict[str, Any]) -> str:
    """The checksum of vLLM's nccl engine, as ours extends it, over weights that come in buckets of three."""
    from vllm.distributed.weight_transfer import nccl_engine

    from actors.nccl_receiver import CheckedNcclEngine

    def consume(post_unpack_func: Any, **_: Any) -> None:
        came = weights(info)
        for start in range(0, len(came), 3):
            post_unpack_func(iter(came[start : start + 3]))

    engine = CheckedNcclEngine.__new__(CheckedNcclEngine)
    engine.model, engine.device = Loads(), torch.device("cpu")
    engine.model_update_group, engine.packed = object(), True
    engine.packed_buffer_size_bytes = engine.packed_num_buffers = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nccl_engine, "packed_nccl_broadcast_consumer", consume)
        engine.receive_weights(engine.parse_update_info(info))
    assert engine.model.loaded == info["names"], "each once, in order"
    assert "load_weights" not in vars(engine.model)
    return engine.digest


def test_every_engine_gets_all_calls_in_order_and_ranks_of_its_own(
    ray_session: Any, engines: list[Any], nccl: tuple[NoNccl, list[str]]
) -> None:
    source, client = LocalSource(), EngineClient(engines, 2, TIMEOUT_S)
    client.version = 7
    sender = NcclSender(source, client, "127.0.0.1", TIMEOUT_S)  # type: ignore[arg-type]
    sender.send_weights()
    names = [name for layer in source.layers() for name in layer]
    assert nccl[1] == names
    assert client.sent_bytes == LAYERS * (64 + 1) * 1024 * 4
    for place, engine in enumerate(engines):
        calls = ray_session.get(engine.kept.remote())
        order = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
        assert [name for name, _ in calls] == [*order, "resume"]
        asked = dict(calls)
        assert asked["init_weight_transfer_engine"]["rank_offset"] == 1 + 2 * place, "two workers behind each"
        assert asked["init_weight_transfer_engine"]["world_size"] == 5
        assert asked["init_weight_transfer_engine"]["packed"]
        assert asked["update_weights"]["names"] == names
        assert asked["finish_weight_update"] == 7
        assert received(asked["update_weights"]) == client.digest
    assert client.lost == {}


def test_the_death_of_an_engine_aborts_the_communicator_under_the_others(
    ray_session: Any, engines: list[Any], nccl: tuple[NoNccl, list[str]]
) -> None:
    client = EngineClient(engines, 1, TIMEOUT_S)
    sender = NcclSender(LocalSource(), client, "127.0.0.1", TIMEOUT_S)  # type: ignore[arg-type]
    ray_session.get(engines[1].die_when_receiving.remote())
    with pytest.raises(EnginesLostError):
        sender.send_weights()
    assert nccl[0].aborted
    assert client.lost == {1: "died when asked to receive weights"}
    assert [name for name, _ in ray_session.get(engines[0].kept.remote())][-1] == "update_weights", "it stays paused"


def test_an_engine_that_got_other_weights_than_were_sent_is_cut_off(
    ray_session: Any, engines: list[Any], nccl: tuple[NoNccl, list[str]]
) -> None:
    client = EngineClient(engines, 1, TIMEOUT_S)
    client.version = 3
    sender = NcclSender(LocalSource(), client, "127.0.0.1", TIMEOUT_S)  # type: ignore[arg-type]
    ray_session.get(engines[1].change_a_weight.remote())
    sender.send_weights()
    assert list(client.members) == [0]
    said = re.fullmatch(
        r"acknowledged version 3 with checksum (\w{16}); sent was version 3 with (\w{16})", client.lost[1]
    )
    assert said is not None and said[1] != said[2] == client.digest
