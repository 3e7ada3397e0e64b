"""What a run reports to Prometheus, and the dashboard that shows it.

Queries are parsed by `promql-parser`, with Prometheus' functions and types. The rest of the JSON is checked for what is
asked here, not by Grafana's model of a dashboard: that of grafana-foundation-sdk 10.1.0 takes a width of "eight" too.
The test with Ray scrapes the address at which Prometheus itself would ask Ray's agent.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from cluster.observe import COUNTERS, GAUGES, Exporter, prometheus_name

DASHBOARD = Path(__file__).parents[1] / "cluster/grafana.json"
EXPORTED = {prometheus_name(key) for key in (*GAUGES, *COUNTERS)}
SHOWS = {"observe.py", "live.py", "report"}
"""Code that names metrics and makes none."""
WAIT_S = 120.0
"""Ray's agent comes up late on a machine with other work, and processes report to it every few seconds."""


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def parse(query: str) -> None:
    """As Prometheus gets it: Grafana puts a duration in the place of its variable.

    Raises:
        ValueError: it is no PromQL.
    """
    promql_parser.parse(query.replace("$__rate_interval", "1m"))


def asked_for(text: str) -> set[str]:
    """The metrics that a query names."""
    return set(re.findall(r"\bray_\w+", text))


class TestDashboard:
    def test_it_asks_for_metrics_that_a_run_exports_and_nothing_else(self, dashboard: dict[str, Any]) -> None:
        queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        assert all(len(asked_for(query)) == 1 for query in queries)
        assert set().union(*map(asked_for, queries)) < EXPORTED
        variables = [json.dumps(variable) for variable in dashboard["templating"]["list"]]
        assert asked_for(" ".join(variables)) == {"ray_uniapl_step"}

    def test_every_query_is_of_the_chosen_runs(self, dashboard: dict[str, Any]) -> None:
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                assert target["expr"].count('{run=~"$run"}') == 1
                assert target["expr"].count("(") == target["expr"].count(")")

    def test_prometheus_would_take_every_query(self, dashboard: dict[str, Any]) -> None:
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                parse(target["expr"])

    @pytest.mark.parametrize(
        "query",
        [
            'sum by (run) (rate(ray_uniapl_step{run=~"$run"}))',  # of a moment, not of a range
            'sum by (run) (rated(ray_uniapl_step{run=~"$run"}[$__rate_interval]))',
            'max by run (ray_uniapl_step{run=~"$run"})',
            'max by (run) (ray_uniapl_step{run=~"$run})',
            'max by (run) (ray_uniapl_step{run=~"$run"}[$__interval])',
        ],
    )
    def test_and_would_not_take_a_wrong_one(self, query: str) -> None:
        with pytest.raises(ValueError):
            parse(query)

    def test_it_shows_what_a_run_is_judged_by(self, dashboard: dict[str, Any]) -> None:
        shown = asked_for(json.dumps([panel["targets"] for panel in dashboard["panels"]]))
        wanted = ["reward/mean", "discriminator/gap", "staleness/mean", "queue/ready", "fleet/members"]
        wanted += [key for key in GAUGES if key.startswith(("loss/", "time/", "tokens/")) and key != "time/step"]
        assert {prometheus_name(key) for key in wanted} <= shown

    def test_panels_have_their_own_ids_and_places_and_the_chosen_source(self, dashboard: dict[str, Any]) -> None:
        panels = dashboard["panels"]
        assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
        assert dashboard["templating"]["list"][0]["type"] == "datasource"
        for panel in panels:
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            letters = [target["refId"] for target in panel["targets"]]
            assert len(set(letters)) == len(letters)
            place = panel["gridPos"]
            assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        for one, other in combinations((panel["gridPos"] for panel in panels), 2):
            beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
            assert beside or above


def test_names_are_such_as_prometheus_takes() -> None:
    assert all(re.fullmatch(r"ray_uniapl_[a-z0-9_]+", name) for name in EXPORTED)
    assert len(EXPORTED) == len(GAUGES) + len(COUNTERS)
    assert prometheus_name("reward/mean") == "ray_uniapl_reward_mean"
    assert prometheus_name("tokens/trained") == "ray_uniapl_tokens_trained_total"


def test_what_is_exported_is_logged_by_the_run_under_this_name() -> None:
    """Names stand in the code whole or, as those of the queue, in two parts."""
    root = DASHBOARD.parents[1]
    files = [path for folder in ("uniapl", "learner", "cluster", "actors") for path in (root / folder).rglob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in files if not SHOWS & set(path.relative_to(root).parts))

    def made(key: str) -> bool:
        part, _, rest = key.partition("/")
        return f'"{key}"' in code or (f'f"{part}/{{' in code and re.search(rf"\b{rest}\b", code) is not None)

    assert [key for key in (*GAUGES, *COUNTERS) if not made(key)] == []
    assert not made("reward/none") and not made("queue/none_such")


def test_prometheus_finds_the_last_values_and_the_sums(ray_session: Any) -> None:
    exporter = Exporter("observed")
    exporter.export(1, {"reward/mean": 0.25, "tokens/trained": 100.0, "fleet/members": 2.0, "check/title": 1.0})
    exporter.export(2, {"reward/mean": 0.5, "tokens/trained": 50.0, "broadcast/bytes": 0.0})
    found = scraped(ray_session, "ray_uniapl_step")
    assert found["ray_uniapl_step"] == 2.0
    assert found["ray_uniapl_reward_mean"] == 0.5
    assert found["ray_uniapl_fleet_members"] == 2.0
    assert found["ray_uniapl_tokens_trained_total"] == 150.0
    assert set(found) <= EXPORTED
    assert not any("check" in name for name in found)


def scraped(ray: Any, awaited: str) -> dict[str, float]:
    """Our metrics of the run `observed`, as the agent of this node exposes them."""
    [node] = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + WAIT_S
    while True:
        found = {}
        for line in urllib.request.urlopen(address, timeout=10).read().decode().splitlines():
            if line.startswith("ray_uniapl_") and 'run="observed"' in line:
                found[line.partition("{")[0]] = float(line.rpartition(" ")[2])
        if awaited in found or time.monotonic() > deadline:
            return found
        time.sleep(1)
