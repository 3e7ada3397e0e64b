"""Whether this process is the driver of a job that was submitted to a Ray cluster."""

from __future__ import annotations

import os

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for a job's entrypoint."""


def in_job() -> bool:
    return JOB_CONFIG in os.environ
