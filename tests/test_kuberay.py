"""The files for Kubernetes, checked without a cluster.

Pods, the loader's job, volume claim and network policy with Kubernetes' schemas (`kubernetes-validate`, strict);
KubeRay's own fields with the schema of its CRD (`helpers_kuberay.py`); the groups with the code by which Ray's
autoscaler reads them.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from helpers_kuberay import CRD, KINDS
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from cluster.autoscaler import limit_of
from cluster.cli import _arguments
from cluster.placement import Site
from cluster.room import check_room, needs
from uniapl.config import Config, load_config
from uniapl.shared_paths import require_absolute

ROOT = Path(__file__).parents[1]
KUBERAY = {"RayJob": "kuberay.yaml", "RayCluster": "kuberay-cluster.yaml"}
BASE = "kuberay-base.yaml"
PARTS = ["learner", "rollout", "reward"]
KUBERNETES = ["1.31", "1.37"]


def text(name: str) -> str:
    return (ROOT / "cluster" / name).read_text(encoding="utf-8")


def kuberay(kind: str) -> dict[str, Any]:
    return yaml.safe_load(text(KUBERAY[kind]))


def ray_cluster(kind: str) -> dict[str, Any]:
    spec = kuberay(kind)["spec"]
    return spec["rayClusterSpec"] if kind == "RayJob" else spec


def put(tree: Any, where: str, value: Any) -> None:
    """Set the field at `where`, such as `a.0.b`."""
    *path, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    for key in path:
        tree = tree[key]
    tree[last] = value


@pytest.mark.parametrize("kind", KUBERAY)
class TestKubeRay:
    def test_the_crd_takes_the_file(self, kind: str) -> None:
        KINDS[kind].validate(kuberay(kind))
        cluster = ray_cluster(kind)
        assert cluster["rayVersion"] == ray.__version__
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["autoscalerOptions"]["version"] == "v2"

    @pytest.mark.parametrize(
        ("where", "value"),
        [
            ("autoscalerOption", {}),
            ("headGroupSpec.replicas", 1),
            ("workerGroupSpecs.1.maxReplica", 8),
            ("workerGroupSpecs.1.maxReplicas", "8"),
            ("workerGroupSpecs.0.resources.learner", 1000),
            ("autoscalerOptions.upscalingMode", "Fast"),
            ("autoscalerOptions.resources.limits.memory", "1 GiB"),
            ("gcsFaultToleranceOptions", {"redisPassword": {"valueFrom": {"secretKeyRef": {"name": "a"}}}}),
            ("workerGroupSpecs.0", {"groupName": "learner"}),
        ],
    )
    def test_and_would_not_take_a_wrong_one(self, kind: str, where: str, value: Any) -> None:
        made = kuberay(kind)
        put(made["spec"]["rayClusterSpec"] if kind == "RayJob" else made["spec"], where, value)
        with pytest.raises(jsonschema.ValidationError):
            KINDS[kind].validate(made)

    def test_ray_reads_the_same_groups_as_on_the_clouds(self, kind: str) -> None:
        resource = {"metadata": {"name": "uniapl", "namespace": "default"}, "spec": ray_cluster(kind)}
        types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
        assert sorted(types) == sorted(["headgroup", *PARTS])
        assert types["headgroup"]["resources"]["CPU"] == 0
        for part in PARTS:
            assert [kind for kind, node in types.items() if part in node["resources"]] == [part]
            assert types[part]["resources"][part] == 1000
        assert [types["learner"][key] for key in ("min_workers", "max_workers")] == [1, 1]
        assert [types["rollout"][key] for key in ("min_workers", "max_workers")] == [0, 8]
        assert {kind: node["resources"].get("GPU", 0) for kind, node in types.items()} == {
            "headgroup": 0,
            "learner": 8,
            "rollout": 1,
            "reward": 0,
        }

    @pytest.mark.parametrize("version", KUBERNETES)
    def test_kubernetes_takes_the_pods(self, kind: str, version: str) -> None:
        claim, _, policy = base()
        cluster = ray_cluster(kind)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
            kubernetes_validate.validate(pod, version, strict=True)
            check_pod(group["template"], claim, policy)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod | {"spec": pod["spec"] | {"toleration": []}}, version, strict=True)


def base() -> list[dict[str, Any]]:
    """Claim, loader and network policy."""
    return list(yaml.safe_load_all(text(BASE)))


def check_pod(template: dict[str, Any], claim: dict[str, Any], policy: dict[str, Any]) -> None:
    assert template["spec"]["securityContext"]["runAsNonRoot"]
    assert template["metadata"]["labels"].items() >= policy["spec"]["podSelector"]["matchLabels"].items()
    assert template["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert template["spec"]["containers"][0]["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_claim_loader_and_policy(version: str) -> None:
    claim, loader, policy = made = base()
    assert [one["kind"] for one in made] == ["PersistentVolumeClaim", "Job", "NetworkPolicy"]
    for one in made:
        kubernetes_validate.validate(one, version, strict=True)
    check_pod(loader["spec"]["template"], claim, policy)
    wrong = [(claim, "spec.storageClas", "a"), (loader, "spec.backoffLimit", "four"), (policy, "spec.ingres", [])]
    for one, where, value in wrong:
        put(one, where, value)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(one, version, strict=True)


def commands(script: str) -> list[list[str]]:
    return [line.split() for line in script.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_loader_runs_the_commands_of_the_recipe_and_fills_what_the_run_reads() -> None:
    """Both commands go on where an earlier try ended, so that the job may be tried again."""
    job = kuberay("RayJob")["spec"]
    recipe = ROOT / "configs" / Path(shlex.split(job["entrypoint"])[2]).name
    comment = "".join(line.removeprefix("#") for line in recipe.read_text().splitlines(True) if line.startswith("#"))
    wanted = [
        line.split() for line in comment.replace("\\\n", " ").splitlines() if "hf " in line or "data import" in line
    ]
    pod = base()[1]["spec"]["template"]["spec"]["containers"][0]
    [script] = pod["args"]
    assert [line.split() for line in script.replace("\\\n", " ").splitlines()] == wanted
    assert pod["command"] == ["bash", "-euo", "pipefail", "-c"] and pod["workingDir"] == "/shared"
    config, local = entrypoint()[0], load_config(recipe)
    for read, there in [(config.model.path, local.model.path), *zip(config.data.train, local.data.train, strict=True)]:
        assert read == f"/shared/{there}"
    assert wanted[0][-1] == local.model.path and Path(local.data.train[0]).parent == Path(wanted[1][5])
    image = pod["image"]
    assert [one["image"] for one in ray_cluster("RayJob")["headGroupSpec"]["template"]["spec"]["containers"]] == [image]


def test_a_ray_cluster_that_stays_is_that_of_the_job_with_a_head_that_comes_back() -> None:
    """For a RayJob of this mode KubeRay makes no second head: a block for it there would do nothing."""
    job, cluster = kuberay("RayJob")["spec"], ray_cluster("RayCluster")
    assert job["submissionMode"] == "SidecarMode" and "gcsFaultToleranceOptions" not in job["rayClusterSpec"]
    assert job["backoffLimit"] > 0 and job["entrypoint"].endswith(" --resume")
    assert "redisAddress" in cluster.pop("gcsFaultToleranceOptions")
    assert cluster == job["rayClusterSpec"]


@pytest.mark.parametrize(
    ("where", "value"),
    [("entrypoints", "a"), ("backoffLimit", "2"), ("shutdownAfterJobFinishes", 1), ("suspend", "no")],
)
def test_the_crd_would_not_take_a_wrong_job(where: str, value: Any) -> None:
    job = kuberay("RayJob")
    put(job["spec"], where, value)
    with pytest.raises(jsonschema.ValidationError):
        KINDS["RayJob"].validate(job)


def test_the_crd_is_a_schema_and_says_where_it_is_from() -> None:
    for validator in KINDS.values():
        validator.check_schema(validator.schema)
    source = json.loads(CRD.read_text())["source"]
    assert source["tag"] == "v1.7.0" and "Apache-2.0" in source["of"] and len(source["sha256"]) == 64


def entrypoint() -> tuple[Config, Any]:
    """The job's configuration, and its command line."""
    program, *words = shlex.split(kuberay("RayJob")["spec"]["entrypoint"])
    arguments = _arguments([word.replace("/opt/uniapl", str(ROOT)) for word in words])
    assert program == "uniapl"
    return load_config(arguments.config, arguments.overrides, arguments.methods), arguments


def test_the_entrypoint_is_a_command_line_of_ours() -> None:
    config, arguments = entrypoint()
    require_absolute(config)
    assert arguments.resume
    resource = {"metadata": {"name": "uniapl", "namespace": "default"}, "spec": ray_cluster("RayJob")}
    limit = limit_of(_derive_autoscaling_config_from_ray_cr(resource))
    check_room(needs(config, Site(gpu=True, kinds=frozenset(PARTS))), [limit.head], limit)
