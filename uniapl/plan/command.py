"""`uniapl plan`: from the command's options to what is printed."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import replace

from uniapl.config import Config
from uniapl.plan.fit import GIB, Machines
from uniapl.plan.pace import Rates, rates_of_run
from uniapl.plan.plan import make_plan
from uniapl.plan.show import show_plan


def run(config: Config, options: Namespace) -> int:
    """Print the plan; returns 0 when everything fits, else 1.

    Args:
        options: `gpus`, `node_gpus`, `gpu_memory` and `node_memory` (GiB), `bandwidth` (GB/s), `generate_tokens_per_s`,
            `train_tokens_per_s`, `measured` (a run's folder) and `json`. What is given goes before what was measured.

    Raises:
        ConfigError, RunError: a model or a run is not what it should be.
    """
    rates = rates_of_run(options.measured) if options.measured else Rates()
    given = {
        "bandwidth": options.bandwidth,
        "generate": options.generate_tokens_per_s,
        "train": options.train_tokens_per_s,
    }
    rates = replace(rates, **{name: value for name, value in given.items() if value is not None})
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    machines = Machines(options.gpus, options.node_gpus, options.gpu_memory, memory, options.node_memory)
    plan = make_plan(config, machines, rates)
    if options.json:
        print(json.dumps(plan.to_dict(), indent=1))
    else:
        show_plan(plan)
    return 1 if plan.misfits else 0
