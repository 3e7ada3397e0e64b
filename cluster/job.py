"""What the driver of a job that was submitted to a Ray cluster knows of it, and says."""

from __future__ import annotations

import json
import os

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for a job's entrypoint."""
RUN_FOLDER = "uniapl_run_folder"
"""In a job's metadata: where its run is."""


def in_job() -> bool:
    """Whether this process is such a driver."""
    return JOB_CONFIG in os.environ


def record_run(folder: str) -> None:
    """Put the run's folder into this job's metadata, as `uniapl submit` does: there `uniapl watch` looks.

    Nothing public changes a job's metadata. Ray writes this record when the job starts and when it ends, not between.

    Args:
        folder: on storage that the cluster's nodes share, or a URL.
    """
    from ray._private.ray_constants import KV_NAMESPACE_JOB
    from ray.dashboard.modules.job.common import JobInfoStorageClient
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    job = (json.loads(os.environ[JOB_CONFIG]).get("metadata") or {}).get("job_submission_id")
    key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job).encode()
    if found := _internal_kv_get(key, namespace=KV_NAMESPACE_JOB):
        record = json.loads(found)
        record["metadata"] = (record.get("metadata") or {}) | {RUN_FOLDER: folder}
        _internal_kv_put(key, json.dumps(record).encode(), namespace=KV_NAMESPACE_JOB)
