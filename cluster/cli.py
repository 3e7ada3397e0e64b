"""The command `uniapl`. Heavy imports wait until a command needs them, so that help is instant."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

DATA_FOLDER = Path("data/local")
MODEL_FOLDER = Path("models/SmolLM2-135M-Instruct")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: done, or ended by SIGTERM; 1: a plan does not fit (or a traceback); 2: wrong input, or the run cannot go on;
    130: Ctrl-C.
    """
    if not Path("/proc/driver/nvidia").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for a GPU and warns at every import
    sys.path.insert(0, os.getcwd())  # where a user's `module:function` rewards stand
    arguments = _arguments(argv)
    from cluster.signals import Terminated
    from uniapl.config_errors import ConfigError
    from uniapl.data.errors import DataError
    from uniapl.runlog import RunError

    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        return int(arguments.run(arguments) or 0)
    except (ConfigError, DataError, RunError) as error:
        print(getattr(error, "cause", error), file=sys.stderr)  # Ray hands on an actor's error with it as the cause
        return 2
    except Terminated:
        print("ended by SIGTERM; `--resume` goes on from the newest checkpoint", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; `--resume` goes on from the newest checkpoint", file=sys.stderr)
        return 130


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, parsed; KEY=VALUE may also stand after options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(late) < len(rest) or (late and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        arguments.overrides += late
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uniapl", description="Post-train a language model with demonstrations, rollouts and an adversarial term."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train as a configuration says")
    train.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, such as configs/local.yaml")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as run.steps=5 learner.ranks=2")
    train.add_argument("-m", "--method", help="a file in CONFIG's methods/ folder, such as sft, or a path")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run's folder")
    train.set_defaults(run=_train)

    job = commands.add_parser("submit", help="train as a job on a Ray cluster")
    job.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file below the current folder")
    job.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as run.folder=/shared/runs")
    job.add_argument("-m", "--method", help="a file in CONFIG's methods/ folder, such as sft, or a path")
    job.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run's folder")
    job.add_argument("--address", metavar="URL", help="of the cluster's dashboard, such as http://127.0.0.1:8265")
    job.add_argument("--no-wait", action="store_true", help="come back at once; the job goes on")
    job.set_defaults(run=_submit)

    look = commands.add_parser("watch", help="the live table of a run that goes on elsewhere")
    look.add_argument("place", metavar="RUN|ADDRESS", help="a run's folder, or the URL of a cluster's dashboard")
    look.add_argument("run_folder", nargs="?", metavar="FOLDER", help="on the cluster; else the newest job's")
    look.add_argument("--json", action="store_true", help="one JSON object for each step")
    look.set_defaults(run=_watch)

    report = commands.add_parser("report", help="write a run's report.html again")
    report.add_argument("folder", type=Path, metavar="RUN", help="such as runs/local")
    report.set_defaults(run=_report)

    _add_plan(commands)

    data = commands.add_parser("data", help="the local model and data set").add_subparsers(
        required=True, metavar="WHAT"
    )
    model = data.add_parser("model", help="convert the packaged SmolLM2 into a Hugging Face folder, once")
    model.add_argument("--out", type=Path, default=MODEL_FOLDER)
    model.set_defaults(run=_data_model)
    prepare = data.add_parser("prepare", help="build the local data set again")
    prepare.add_argument("--out", type=Path, default=DATA_FOLDER)
    prepare.add_argument("--model", type=Path, default=MODEL_FOLDER, help="whose tokenizer and samples are used")
    prepare.add_argument("--seed", type=int, default=0)
    prepare.add_argument("--record", action="store_true", help="sample the plain responses anew, with vLLM")
    prepare.set_defaults(run=_data_prepare)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan", help="what a run will need, by arithmetic: nothing is started; status 1: something does not fit"
    )
    plan.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file; of models only config.json is read")
    plan.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as learner.ranks=8")
    plan.add_argument("-m", "--method", help="as for train")
    plan.add_argument("--gpus", type=_count, metavar="N", help="there are; 0: CPUs alone; default: as many as needed")
    plan.add_argument("--node-gpus", type=_whole, default=8, metavar="N", help="GPUs of one node; default: 8")
    plan.add_argument("--gpu-memory", type=_positive, default=80, metavar="GIB", help="of one GPU; default: 80")
    plan.add_argument("--bandwidth", type=_positive, metavar="GB/S", help="of a broadcast")
    plan.add_argument("--generate-tokens-per-s", type=_positive, metavar="X", help="of all engines together")
    plan.add_argument("--train-tokens-per-s", type=_positive, metavar="X", help="of all learner ranks together")
    plan.add_argument("--run", type=Path, metavar="RUN", dest="measured", help="a run whose rates to take")
    plan.add_argument("--json", action="store_true", help="every figure, in bytes, tokens and seconds")
    plan.set_defaults(run=_plan)


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: 0 or more")
    return number


def _whole(text: str) -> int:
    if (number := _count(text)) == 0:
        raise argparse.ArgumentTypeError("got 0; allowed: 1 or more")
    return number


def _positive(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a number > 0")
    return number


def _train(arguments: argparse.Namespace) -> None:
    from uniapl.config import load_config

    config = load_config(arguments.config, arguments.overrides, arguments.method)
    from cluster.checkpoints import full_disk_told
    from cluster.driver import train

    with full_disk_told(config.run_dir):
        report = train(config, arguments.resume)
    print(f"report: {report}")


def _submit(arguments: argparse.Namespace) -> int:
    from cluster.submit import submit

    a = arguments
    return submit(a.config, a.overrides, a.method, a.resume, a.address, wait=not a.no_wait)


def _watch(arguments: argparse.Namespace) -> int:
    from cluster.watch import watch

    return watch(arguments.place, arguments.run_folder, arguments.json)


def _report(arguments: argparse.Namespace) -> None:
    from uniapl.config_errors import ConfigError
    from uniapl.report import write_report

    if not (arguments.folder / "config.yaml").is_file():
        raise ConfigError(f"{arguments.folder}: holds no config.yaml; allowed: the folder of a run, such as runs/local")
    print(f"report: {write_report(arguments.folder)}")


def _plan(arguments: argparse.Namespace) -> int:
    from uniapl.config import load_config
    from uniapl.plan.command import run

    config = load_config(arguments.config, arguments.overrides, arguments.method)
    return run(config, arguments)


def _data_model(arguments: argparse.Namespace) -> None:
    from uniapl.data.local_model import prepare_model

    print(f"model: {prepare_model(arguments.out)}")


def _data_prepare(arguments: argparse.Namespace) -> None:
    from actors.sample import sample_responses
    from uniapl.data.local_dataset import prepare

    print(prepare(arguments.out, arguments.model, arguments.seed, arguments.record, sample_responses))


if __name__ == "__main__":
    sys.exit(main())
