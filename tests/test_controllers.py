"""The weights of the terms over the run."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from uniapl.config import ObjectiveConfig
from uniapl.objective.controllers import MEASURED, Controllers
from uniapl.objective_config import TERMS, objective_conflicts

LAGRANGIAN = {"kind": "lagrangian", "value": 0.5, "target": 1.0, "rate": 0.2, "min": 0.1, "max": 2.0}


def objective(**weights: Any) -> ObjectiveConfig:
    tree: dict[str, Any] = {term: {"weight": weight} for term, weight in weights.items()}
    if "adversarial" in tree:
        tree["adversarial"]["discriminator"] = "embedding"
    found = ObjectiveConfig.model_validate(tree)
    assert objective_conflicts(found) == []
    return found


def over(steps: list[int], term: str, **weights: Any) -> list[float]:
    controllers = Controllers(objective(**weights))
    return [controllers.weights(step)[term] for step in steps]


class TestConfigured:
    def test_a_number_is_constant_and_every_term_has_a_weight(self) -> None:
        found = Controllers(objective(preference=0.25)).weights(7)
        assert found == {"demonstration": 0.0, "preference": 0.25, "adversarial": 0.0, "kl": 0.0}
        assert tuple(found) == TERMS

    def test_a_schedule_falls_by_half_a_cosine_and_stays(self) -> None:
        weight = {"kind": "schedule", "value": 0.9, "end": 0.05, "steps": 200}
        steps = [0, 50, 100, 150, 200, 1000]
        quarter = 0.425 * math.sqrt(0.5)
        wanted = [0.9, 0.475 + quarter, 0.475, 0.475 - quarter, 0.05, 0.05]
        assert over(steps, "demonstration", demonstration=weight) == pytest.approx(wanted, rel=1e-12)

    def test_a_schedule_warms_up_linearly(self) -> None:
        weight = {"kind": "schedule", "value": 0.8, "end": 0.0, "warmup_steps": 3, "steps": 13}
        found = over([0, 1, 2, 3, 8, 13], "demonstration", demonstration=weight)
        assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.4, 0.0], abs=1e-12)

    def test_a_switch_is_hard(self) -> None:
        weight = {"kind": "switch", "value": 1.0, "end": 0.0, "steps": 100}
        assert over([0, 99, 100, 101], "demonstration", demonstration=weight) == [1.0, 1.0, 0.0, 0.0]

    @pytest.mark.parametrize("mu", [0.0, 0.3, 1.0, 2.5])
    def test_the_complement_is_what_the_demonstrations_leave_and_never_negative(self, mu: float) -> None:
        assert over([0], "preference", preference={"kind": "complement"}, demonstration=mu) == [max(0.0, 1 - mu)]

    def test_the_complement_follows_a_lagrangian_weight(self) -> None:
        controllers = Controllers(objective(preference={"kind": "complement"}, demonstration=LAGRANGIAN))
        controllers.update(0, {"expert/nll": 2.0})
        found = controllers.weights(1)
        assert (found["demonstration"], found["preference"]) == pytest.approx((0.7, 0.3))

    def test_configured_weights_have_no_state(self) -> None:
        controllers = Controllers(objective(preference=1.0, demonstration={"kind": "schedule", "value": 1.0}))
        before = controllers.weights(3)
        controllers.update(3, {"expert/nll": 99.0, "kl/reference": math.nan})
        assert (controllers.weights(3), controllers.state_dict()) == (before, {})


class TestLagrangian:
    @pytest.mark.parametrize(("measured", "wanted"), [(1.5, 0.6), (1.0, 0.5), (0.5, 0.4), (99.0, 2.0), (-99.0, 0.1)])
    @pytest.mark.parametrize("term", MEASURED)
    def test_it_moves_by_rate_times_violation_within_its_bounds(
        self, term: str, measured: float, wanted: float
    ) -> None:
        controllers = Controllers(objective(**{term: LAGRANGIAN}))
        assert controllers.weights(0)[term] == 0.5
        controllers.update(0, {MEASURED[term]: measured})
        assert controllers.weights(1)[term] == pytest.approx(wanted)

    def test_several_move_on_their_own_measurements(self) -> None:
        controllers = Controllers(objective(demonstration=LAGRANGIAN, adversarial=LAGRANGIAN, kl=LAGRANGIAN))
        controllers.update(0, {"expert/nll": 2.0, "discriminator/gap": 1.0, "kl/reference": 0.0})
        found = controllers.weights(1)
        assert [found[term] for term in MEASURED] == pytest.approx([0.7, 0.5, 0.3])

    def test_without_a_measurement_it_stays(self) -> None:
        controllers = Controllers(objective(demonstration=LAGRANGIAN, kl=LAGRANGIAN))
        controllers.update(0, {"kl/reference": 2.0, "loss/total": 1.0})
        found = controllers.weights(1)
        assert (found["demonstration"], found["kl"]) == pytest.approx((0.5, 0.7))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_measurement_that_is_not_finite_ends_the_run_and_moves_nothing(self, bad: float) -> None:
        controllers = Controllers(objective(demonstration=LAGRANGIAN, kl=LAGRANGIAN))
        with pytest.raises(ValueError, match=rf"^step 5: kl/reference is {bad}, the kl weight cannot follow it$"):
            controllers.update(4, {"expert/nll": 2.0, "kl/reference": bad})
        assert controllers.state_dict() == {"demonstration": 0.5, "kl": 0.5}

    def test_it_holds_a_measurement_that_answers_to_it_at_the_target(self) -> None:
        controllers = Controllers(objective(demonstration=LAGRANGIAN))
        measured = math.nan
        for step in range(200):  # the heavier the term, the smaller what it minimises
            measured = 1.8 - controllers.weights(step)["demonstration"]
            controllers.update(step, {"expert/nll": measured})
        assert measured == pytest.approx(1.0, abs=1e-6)

    def test_a_weight_of_zero_goes_on_being_measured_and_comes_back(self) -> None:
        o = objective(preference=1.0, demonstration=LAGRANGIAN | {"min": 0.0})
        controllers = Controllers(o)
        controllers.update(0, {"expert/nll": -99.0})
        weights = controllers.weights(1)
        assert weights["demonstration"] == 0.0
        assert o.active("demonstration", weights)
        assert o.demonstrations_at(1)
        controllers.update(1, {"expert/nll": 2.0})
        assert controllers.weights(2)["demonstration"] == pytest.approx(0.2)

    def test_the_state_is_json_and_goes_on_where_it_was(self) -> None:
        o = objective(demonstration=LAGRANGIAN, adversarial=LAGRANGIAN)
        one, other = Controllers(o), Controllers(o)
        one.update(0, {"expert/nll": 1.7, "discriminator/gap": 0.2})
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
        assert other.weights(1) == one.weights(1) != Controllers(o).weights(1)
        one.update(1, {"expert/nll": 1.7})
        assert other.weights(2) != one.weights(2)

    @pytest.mark.parametrize("state", [{}, {"kl": 1.0}, {"demonstration": 1.0, "kl": 1.0}])
    def test_the_state_of_another_configuration_is_refused(self, state: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=r"^saved lagrangian weights: .*; the configuration has: demonstration$"):
            Controllers(objective(demonstration=LAGRANGIAN)).load_state_dict(state)


class TestWarmUpOfACoTrainedDiscriminator:
    @pytest.mark.parametrize("weight", [0.5, LAGRANGIAN, {"kind": "schedule", "value": 0.5, "end": 0.5}], ids=str)
    def test_the_term_does_not_count_and_its_weight_does_not_move(self, weight: Any) -> None:
        controllers = Controllers(
            ObjectiveConfig.model_validate(
                {
                    "preference": {"weight": 1.0},
                    "adversarial": {
                        "weight": weight,
                        "discriminator": "cotrained",
                        "cotrained": {"warmup_steps": 2},
                    },
                }
            )
        )
        found = []
        for step in range(4):
            found.append(controllers.weights(step)["adversarial"])
            controllers.update(step, {"discriminator/gap": 2.0})
        moved = 0.7 if weight is LAGRANGIAN else 0.5
        assert found == pytest.approx([0.0, 0.0, 0.5, moved])
