"""KubeRay's API as its CRD describes it: `kuberay_rayjob_crd.json`, whose `source` says where it is from.

The spec of a RayCluster is what a RayJob has as `rayClusterSpec`: both CRDs of that version say the same of it. Fields
that the CRD does not have are refused, as kubectl has the API server do. Pods are checked with Kubernetes' own schemas.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

CRD = Path(__file__).parent / "kuberay_rayjob_crd.json"


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without unknown fields, at every depth."""
    found = dict(schema)
    if "properties" in schema:
        found["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
        found["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        found["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        found["items"] = strict(schema["items"])
    return found


def _kind(kind: str, spec: dict[str, Any], longest: int) -> dict[str, Any]:
    name = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": longest}
    given = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "spec": spec}
    given["metadata"] = {"type": "object", "properties": {"name": name}, "required": ["name"]}
    return {"type": "object", "properties": given, "required": sorted(given), "additionalProperties": False}


_SPEC = strict(json.loads(CRD.read_text(encoding="utf-8"))["schema"]["properties"]["spec"])
KINDS = {
    "RayJob": Draft202012Validator(_kind("RayJob", _SPEC, 47)),
    "RayCluster": Draft202012Validator(_kind("RayCluster", _SPEC["properties"]["rayClusterSpec"], 53)),
}
"""What checks an object, by its kind; how long a name may be is from KubeRay's operator, the CRD does not say it."""
