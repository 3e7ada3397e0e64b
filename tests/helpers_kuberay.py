"""The fields of KubeRay's API v1 that cluster/kuberay.yaml may use, as a JSON schema.

No package carries KubeRay's own schema, so names and types are written down here, from its CRD of version 1.7; pods are
checked with Kubernetes' own schemas instead (`kubernetes_validate`).
"""

from __future__ import annotations

from typing import Any

TEXT = {"type": "string"}
FLAG = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD = {"type": "object"}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_group = {"resources": TEXTS, "rayStartParams": TEXTS, "labels": TEXTS, "template": POD}
_quantities = {"type": "object", "properties": {"limits": TEXTS, "requests": TEXTS}, "additionalProperties": False}
_from_secret = _object(["name", "key"], name=TEXT, key=TEXT)
_cluster = _object(
    ["headGroupSpec", "workerGroupSpecs", "rayVersion"],
    rayVersion=TEXT,
    authOptions=_object(["mode"], mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=_object(
        [],
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Conservative", "Default", "Aggressive"]},
        idleTimeoutSeconds=COUNT,
        resources=_quantities,
    ),
    gcsFaultToleranceOptions=_object(
        ["redisAddress"],
        redisAddress=TEXT,
        redisUsername={"type": "object"},
        redisPassword=_object(["valueFrom"], valueFrom=_object(["secretKeyRef"], secretKeyRef=_from_secret)),
        externalStorageNamespace=TEXT,
    ),
    headGroupSpec=_object(["template"], serviceType=TEXT, enableIngress=FLAG, **_group),
    workerGroupSpecs={
        "type": "array",
        "items": _object(
            ["groupName", "minReplicas", "maxReplicas", "template"],
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            idleTimeoutSeconds=COUNT,
            priority={"type": "integer"},
            **_group,
        ),
    },
)
RAY_JOB = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=_object(["name"], name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}),
    spec=_object(
        ["entrypoint", "rayClusterSpec"],
        entrypoint=TEXT,
        backoffLimit=COUNT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        activeDeadlineSeconds=COUNT,
        runtimeEnvYAML=TEXT,
        rayClusterSpec=_cluster,
    ),
)
