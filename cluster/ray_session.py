"""Connecting to Ray: one of our own on this machine, or a cluster that runs already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cluster.placement import logical_cpus
from uniapl.config import Config
from uniapl.config_errors import ConfigError

# Ray would start an idle worker per CPU; ours all have an environment of their own and could not use them.
NO_PRESTART = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}


@contextmanager
def ray_session(config: Config) -> Iterator[bool]:
    """Be connected to Ray inside the block; yields whether there are GPUs.

    With `cluster.address: local` Ray is started here and ended with the block, also by an exception.

    Raises:
        ConfigError: nothing answers at `cluster.address`.
    """
    address = config.cluster.address
    quiet = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address == "local":
            ray.init(
                address="local",
                num_cpus=logical_cpus(config),
                include_dashboard=False,
                object_store_memory=int(config.cluster.object_store_gib * 2**30),
                _system_config=NO_PRESTART,
                **quiet,
            )
        else:
            ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise ConfigError(f"cluster.address: got '{address}', no Ray answers there: {error}") from None
    try:
        yield ray.cluster_resources().get("GPU", 0) > 0
    finally:
        ray.shutdown()
