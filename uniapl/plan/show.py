"""A plan on one screen. `=` stands before exact figures, `~` before estimates, `≤` before what is at most."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uniapl.live import duration
from uniapl.plan.engine import EngineMemory
from uniapl.plan.fit import GIB
from uniapl.plan.learner import Part
from uniapl.plan.plan import Plan

WIDTH = 96


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print `plan`, at most `WIDTH` columns wide."""
    console = console or Console(highlight=False)
    width = min(console.width, WIDTH)

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), width=width)

    say(_title(plan), "bold")
    memory = Table.grid(padding=(0, 3, 0, 0))
    memory.add_row(_parts("one learner rank", plan.learner), *_engine(plan))
    console.print(memory)
    rest = Table.grid(padding=(0, 2, 0, 0))
    for label, text in _lines(plan):
        rest.add_row(Text(label, style="bold"), Text(text))
    console.print(rest, width=width)
    for note in plan.notes:
        say(f"note: {note}")
    for misfit in plan.misfits:
        say(str(misfit), "bold red")
    if not plan.misfits:
        say("everything fits")


def _title(plan: Plan) -> str:
    ranks = "1 learner rank" if plan.ranks == 1 else f"{plan.ranks} learner ranks"
    engines = "1 engine" if plan.engines == 1 else f"{plan.engines} engines"
    if not plan.machines.gpu:
        return f"{plan.name}: {ranks} and {engines} on CPUs with {plan.machines.cpu_gib:.1f} GiB"
    if plan.tensor_parallel > 1:
        engines += f" of {plan.tensor_parallel} GPUs"
    gpus = "1 GPU, in turns," if plan.in_turns else f"{plan.gpus} GPUs"
    return f"{plan.name}: {ranks} and {engines}: {gpus} of {plan.machines.gpu_gib:g} GiB"


def _parts(title: str, parts: list[Part]) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_row(Text(title, style="bold"), "", Text("GiB", style="bold", justify="right"))
    for part in parts:
        table.add_row(part.name, "=" if part.exact else "~", Text(f"{part.bytes / GIB:,.2f}", justify="right"))
    together = sum(part.bytes for part in parts)
    exact = all(part.exact for part in parts)
    table.add_row("together", "=" if exact else "~", Text(f"{together / GIB:,.2f}", style="bold", justify="right"))
    return table


def _engine(plan: Plan) -> list[Table]:
    if plan.engine is None:
        return []
    title = f"each GPU of an engine (of {plan.tensor_parallel})" if plan.tensor_parallel > 1 else "one engine"
    return [_parts(title, plan.engine.parts)]


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "parameters", f"= {plan.shape.parameters:,}   {plan.model}"
    if plan.machines.gpu:
        ranks = min(plan.ranks, plan.machines.node_gpus)
        host = f"{plan.host_bytes / GIB:.1f} GiB of the node's memory for each rank ({ranks} on a node)"
        yield "loading", f"~ {plan.loading_bytes / GIB:.1f} GiB on a rank's GPU, {host}"
    if plan.engine:
        yield "sequences", _sequences(plan.engine)
        how = "assumed, see --bandwidth" if plan.bandwidth_assumed else "as given or measured"
        seconds = f"~ {duration(plan.broadcast_s)} at {plan.bandwidth:.3g} GB/s ({how})"
        yield "broadcast", f"= {plan.broadcast_bytes / 1e6:,.1f} MB to every worker of every engine, {seconds}"
    t, p = plan.tokens, plan.pace
    sign, said = ("~", "mean lengths of the run") if t.measured else ("≤", "all prompts and responses at their limits")
    yield "tokens", f"{sign} {t.generated:,.0f} generated and {sign} {t.trained:,.0f} trained on in a step ({said})"
    if p is None:
        missing = "--generate-tokens-per-s and --train-tokens-per-s" if t.generated else "--train-tokens-per-s"
        yield "time", f"not known: give {missing}, or --run RUN"
        return
    parts = f"generating {duration(p.generate_s)}, training {duration(p.train_s)}, broadcast {duration(p.broadcast_s)}"
    how = "the longer of the first two + broadcast" if p.staleness_max else "their sum"
    yield "time", f"~ {duration(p.step_s)} a step: {parts}; {how}"
    yield "bottleneck", f"~ {p.bottleneck}"
    bound = f"at most {p.staleness_max} (queue.max_staleness: {plan.max_staleness})"
    yield "staleness", f"~ {p.staleness_mean:.1f} versions in the mean, {bound}"


def _sequences(engine: EngineMemory) -> str:
    cache = f"{max(0, engine.kv_tokens):,} tokens of {engine.kv_token_bytes / 1024:.1f} KiB"
    return f"~ {engine.sequences:,} of {engine.longest:,} tokens at a time (cache: {cache}); asked for: {engine.wanted}"
