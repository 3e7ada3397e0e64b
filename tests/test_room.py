"""What a run needs of a cluster, compared with what there is and what an autoscaler could add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util.placement_group import remove_placement_group

from cluster import room
from cluster.placement import Site, learner_group
from cluster.room import Limit, autoscaler_limit, check_room, needs, wait_for_room
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
    assert (limit.most("GPU"), limit.most("CPU"), limit.most("TPU")) == (8 + 4 * 2, 16 + 64 + 4 * 16, 0)


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


@pytest.mark.parametrize("text", ["", "[]", "max_workers: x", "a: [", "available_node_types: {}\nmax_workers: 2"])
def test_without_a_readable_one_there_is_no_limit(tmp_path: Path, text: str) -> None:
    assert autoscaler_limit(tmp_path / "missing.yaml") is None
    place = tmp_path / "ray_bootstrap_config.yaml"
    place.write_text(text)
    assert autoscaler_limit(place) is None
