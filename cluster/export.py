"""`uniapl export`: a checkpoint of a run as a Hugging Face folder, on one machine, without Ray."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from cluster.checkpoints import checkpoint_steps, newest_checkpoint, whole_checkpoint
from uniapl.config import load_config
from uniapl.config_errors import ConfigError
from uniapl.data.model_folder import read_model_config
from uniapl.model_card import model_card
from uniapl.runlog import RunError


def export_checkpoint(run: Path, step: str = "newest", out: Path | None = None, dtype: str | None = None) -> Path:
    """Write the model; returns its folder.

    Args:
        run: the run's folder.
        step: of a checkpoint, or `newest`, which passes over damaged ones.
        out: a new folder; None: RUN/export/step-NNNNN, which is replaced.
        dtype: of the weights; None: the learner's.

    Raises:
        ConfigError: no run, no such checkpoint, or `out` is there.
        RunError: the checkpoint is damaged or is not of the run's model.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: holds no config.yaml; allowed: the folder of a run, such as runs/local")
    if out is not None and out.exists():
        raise ConfigError(f"--out: {out} is there already; allowed: a new folder")
    config = load_config(run / "config.yaml")
    read_model_config("model.path", config.model.path)
    number, place = _checkpoint(run, step)
    folder = out or run / "export" / place.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = dtype or config.learner.dtype
    card = model_card(run, number, dtype)
    from learner.export import export_shards
    from learner.zero_files import TAG

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{place.name}: weights", total=None)

        def told(done: int, whole: int) -> None:
            bar.update(task, completed=done, total=whole)

        try:
            export_shards(place / TAG, config.model.path, folder, dtype, card, told)
        except RuntimeError as error:
            raise RunError(f"{error}; allowed: what this run wrote, with model.path as it was") from None
    return folder


def _checkpoint(run: Path, step: str) -> tuple[int, Path]:
    steps = checkpoint_steps(run)
    there = ", ".join(map(str, steps)) or "none, it wrote none"
    if step == "newest":
        if (found := newest_checkpoint(run)) is None:
            raise ConfigError(
                f"{run}: no whole checkpoint; steps that are there: {there}; allowed: a run that has one; "
                "model/ is what a run wrote at its end"
            )
        return found
    if not step.isdigit() or int(step) not in steps:
        raise ConfigError(f"--step: got {step}; allowed: newest, or one that is there: {there}")
    return int(step), whole_checkpoint(run, int(step))
