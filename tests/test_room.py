"""What a run needs of a cluster, compared with what there is and what an autoscaler could add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import requests
import yaml
from helpers_cli import start
from helpers_toy import toy_config
from ray.util.placement_group import remove_placement_group

from actors.reward_service import replica_class
from cluster import autoscaler, room
from cluster.autoscaler import Limit, autoscaler_limit
from cluster.placement import Site, learner_group
from cluster.room import Waiting, check_room, needs, wait_for_room
from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.runlog import RunError

GPUS = Site(gpu=True)
HEAD = {"CPU": 16.0}
EIGHT = {"CPU": 64.0, "GPU": 8.0}
TWO = {"CPU": 16.0, "GPU": 2.0}


def config(ranks: int = 1, **rollout: Any) -> Config:
    tree = {"model": {"path": "m"}, "data": {"train": ["t"], "heldout": ["h"]}, "learner": {"ranks": ranks}}
    return Config.model_validate(tree | {"rollout": rollout})


def lines(config: Config, nodes: list[dict[str, float]], limit: Limit | None, site: Site = GPUS) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check_room(needs(config, site), nodes, limit)
    return str(error.value).splitlines()


def test_what_is_missing_is_told_with_who_wants_it_and_the_autoscalers_limit() -> None:
    assert lines(config(ranks=4, actors=2), [HEAD, TWO], Limit(HEAD, [TWO], 1)) == [
        "cluster: needs 6 GPU, 4 for the learner (learner.ranks) and 2 for the engines (rollout.actors); "
        "the cluster has 2, the autoscaler's limit is 2"
    ]


def test_without_an_autoscaler_no_limit_is_named() -> None:
    assert lines(config(ranks=1, actors=4, min_actors=2), [TWO], None) == [
        "cluster: needs 3 GPU, 1 for the learner (learner.ranks) and 2 for the engines (rollout.min_actors); "
        "the cluster has 2"
    ]


def test_an_engine_is_on_one_node() -> None:
    """Eight GPUs in four nodes hold no engine of four."""
    assert lines(config(actors=1, tensor_parallel=4), [HEAD, *[TWO] * 4], None) == [
        "cluster: needs nodes with 4 GPU for the engines; none has over 2"
    ]


def test_nodes_that_are_not_there_yet_count_as_far_as_they_may_come() -> None:
    wanted = config(ranks=8, actors=4)
    check_room(needs(wanted, GPUS), [HEAD], Limit(HEAD, [EIGHT] * 2, 2))
    assert len(lines(wanted, [HEAD], Limit(HEAD, [EIGHT] * 2, 1))) == 1


def test_marked_nodes_only_have_to_exist() -> None:
    site = Site(gpu=True, kinds=frozenset({"learner"}))
    check_room(needs(config(ranks=2, actors=1), site), [EIGHT | {"learner": 1000.0}], None)
    [line] = lines(config(ranks=2, actors=1), [EIGHT], None, site)
    assert line == "cluster: needs nodes with 1 learner for the learner; none has over 0"


def test_the_user_is_told_what_a_run_is_placed_for() -> None:
    assert Site(gpu=True, kinds=frozenset({"rollout", "learner"})).told == (
        "this run is placed for GPUs, where nodes are marked learner, rollout on those"
    )
    assert Site().told == (
        "this run is placed for CPUs (no node there has a GPU, and none that an autoscaler is known to add)"
    )


def aws(ranks: int, actors: int, tensor_parallel: int) -> list[str]:
    """What is said of a run on a cluster of cluster/aws.yaml of which only the head is up."""
    limit = autoscaler_limit(Path(__file__).parents[1] / "cluster/aws.yaml")
    assert limit is not None
    site = Site(gpu=True, kinds=frozenset({"learner", "rollout", "reward"}))
    return lines(config(ranks, actors=actors, tensor_parallel=tensor_parallel), [limit.head], limit, site)


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (
            (9, 1, 1),
            "cluster: needs 9 × (1 CPU, 1 GPU, 1 learner) for the learner (learner.ranks); "
            "its nodes have room for 0, the autoscaler's limit is 8",
        ),
        (
            (12, 4, 1),
            "cluster: needs 12 × (1 CPU, 1 GPU, 1 learner) for the learner (learner.ranks); "
            "its nodes have room for 0, the autoscaler's limit is 8",
        ),
        (
            (1, 12, 1),
            "cluster: needs 12 × (1 CPU, 1 GPU, 1 rollout) for the engines (rollout.actors); "
            "its nodes have room for 0, the autoscaler's limit is 8",
        ),
        (
            (8, 2, 4),
            "cluster: needs nodes with 4 GPU for the engines; none of those for it (`rollout`) has over 1",
        ),
    ],
)
def test_gpus_of_nodes_that_are_meant_for_others_do_not_count(asked: tuple[int, int, int], line: str) -> None:
    assert aws(*asked) == [line]


def test_whole_parts_have_to_fit_on_nodes() -> None:
    """Twelve GPUs in nodes of six are room for two engines of four, not for three."""
    wanted = config(actors=2, tensor_parallel=4)
    check_room(needs(wanted, GPUS), [EIGHT | {"GPU": 6.0}] * 2, None)
    assert lines(config(ranks=1, actors=3, tensor_parallel=4), [EIGHT | {"GPU": 6.0}] * 2 + [TWO], None) == [
        "cluster: needs 3 × (1 CPU, 4 GPU) for the engines (rollout.actors); its nodes have room for 2"
    ]


def test_reward_replicas_take_a_cpu_of_the_nodes_that_are_meant_for_them() -> None:
    wanted = Config.model_validate(config().model_dump() | {"reward": {"min_replicas": 3, "max_replicas": 3}})
    site = Site(kinds=frozenset({"reward"}))
    check_room(needs(wanted, site), [HEAD, {"CPU": 3.0, "reward": 1000.0}], None)
    [line] = lines(wanted, [HEAD, {"CPU": 2.0, "reward": 1000.0}], None, site)
    assert line.startswith("cluster: needs 3 × (1 CPU, 1 reward) for the reward replicas (reward.min_replicas); ")


def test_a_run_without_rollouts_needs_no_engine() -> None:
    tree = {
        "model": {"path": "m"},
        "data": {"train": ["t"]},
        "evaluation": {"prompts": 0},
        "objective": {"preference": {"weight": 0.0}, "demonstration": {"weight": 1.0}},
    }
    assert [need.what for need in needs(Config.model_validate(tree), GPUS)] == ["learner"]


def test_the_limit_is_read_where_ray_up_leaves_it(tmp_path: Path) -> None:
    tree = {
        "max_workers": 5,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 16}},
            "learner": {"resources": {"CPU": 64, "GPU": 8, "learner": 1000}, "max_workers": 1},
            "rollout": {"resources": {"CPU": 16, "GPU": 2, "rollout": 1000}},
        },
    }
    place = tmp_path / "ray_bootstrap_config.yaml"
    place.write_text(yaml.safe_dump(tree))
    limit = autoscaler_limit(place)
    assert limit is not None and limit.at_most == 5
    most = [limit.most(lambda node, name=name: node.get(name, 0)) for name in ("GPU", "CPU", "TPU")]
    assert most == [8 + 4 * 2, 16 + 64 + 4 * 16, 0]


def test_a_run_that_its_machine_can_never_hold_ends_before_anything_starts(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own Ray takes from the environment that the machine has two GPUs. tests/test_job.py has it for a cluster."""
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 2}')
    process = start(toy_config(tmp_path, tiny), "learner.ranks=4")
    output, _ = process.communicate(timeout=120)
    line = "cluster: needs 5 GPU, 4 for the learner (learner.ranks) and 1 for the engines (rollout.actors); "
    assert (process.returncode, output.splitlines()[-1]) == (2, f"{line}the cluster has 2"), output
    assert "loading" not in output


def test_what_is_waited_for_is_told_and_for_how_long(ray_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE_S", 1.0)
    notes: list[str] = []
    tree = config(ranks=1000).model_dump() | {"cluster": {"start_timeout_s": 3.0}}
    wanted = Config.model_validate(tree)
    group = learner_group(wanted, Site())
    try:
        with pytest.raises(RunError) as error:
            wait_for_room(group, wanted, notes.append)
    finally:
        remove_placement_group(group)
    [note] = notes
    assert note.startswith("waiting for nodes: the learner (learner.ranks: 1000) needs 1000 CPU (of ")
    assert note.endswith("are free); for at most 3 s (cluster.start_timeout_s)")
    assert "are free), not there within 3 s (cluster.start_timeout_s); allowed: machines that" in str(error.value)


def test_on_kuberay_the_limit_is_that_of_the_ray_cluster(
    ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the API server is a stand-in: no cluster of Kubernetes can run here."""
    asked = list[str]()
    job = next(yaml.safe_load_all((Path(__file__).parents[1] / "cluster/kuberay.yaml").read_text()))
    found = {"metadata": {"name": "uniapl-x", "namespace": "here"}, "spec": job["spec"]["rayClusterSpec"]}

    def get(client: Any, path: str) -> Any:
        asked.append(f"{client._namespace}/{path}")
        if not found:
            raise requests.HTTPError("403 Client Error: Forbidden")
        return found

    monkeypatch.setattr(autoscaler.KubernetesHttpApiClient, "get", get)
    monkeypatch.setattr(autoscaler, "POD_NAMESPACE", tmp_path / "namespace")
    monkeypatch.setenv("RAY_CLUSTER_NAME", "uniapl-x")
    assert autoscaler_limit(tmp_path / "none") is None  # not in a pod
    (tmp_path / "namespace").write_text("here")
    limit = autoscaler_limit(tmp_path / "none")
    assert limit is not None and asked == ["here/rayclusters/uniapl-x"]
    assert (limit.most(lambda node: node.get("GPU", 0)), limit.at_most) == (16, 12)
    assert autoscaler.open_site(limit) == Site(gpu=True, kinds=frozenset({"learner", "rollout", "reward"}))
    assert autoscaler.open_site(None) == Site()  # of the nodes that are there none has a GPU or a mark
    found["spec"]["enableInTreeAutoscaling"] = False
    assert autoscaler_limit(tmp_path / "none") is None
    found.clear()
    with pytest.warns(UserWarning, match=r"could not be read: 403 .*; parts are placed by the nodes that are there"):
        assert autoscaler_limit(tmp_path / "none") is None


def test_engines_and_replicas_without_a_node_are_told(ray_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    waiting = Waiting(config(actors=3, min_actors=2), notes.append)

    def started(name: str, **options: Any) -> Any:
        return ray.remote(type(name, (), {})).options(**options).remote()

    actors = [started("RolloutActor", resources={"rollout": 1}) for _ in range(2)]
    actors += [started(f"{replica_class()}reward", resources={"reward": 1}), started("RolloutActor")]
    actors += [started("Other", resources={"rollout": 1})]
    try:
        ray.get(actors[3].__ray_ready__.remote(), timeout=60)
        waiting.look()
        assert notes == []  # not yet
        monkeypatch.setattr(room, "PATIENCE_S", 0.0)
        waiting.look()
        waiting.look()
        [note] = notes
        assert note.startswith(
            "waiting for nodes: none yet for reward replicas (1) and rollout actors (2), see `ray status`; "
        )
        assert note.endswith("the run begins with 2 engines, within 600 s (cluster.start_timeout_s)")
    finally:
        for actor in actors:
            ray.kill(actor)


@pytest.mark.parametrize("text", ["", "[]", "max_workers: x", "a: [", "available_node_types: {}\nmax_workers: 2"])
def test_without_a_readable_one_there_is_no_limit(tmp_path: Path, text: str) -> None:
    assert autoscaler_limit(tmp_path / "missing.yaml") is None
    place = tmp_path / "ray_bootstrap_config.yaml"
    place.write_text(text)
    assert autoscaler_limit(place) is None
