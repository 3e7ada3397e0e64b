"""The weights of the terms over the run: those that the configuration fixes, and those that follow a measurement."""

from __future__ import annotations

import math

from uniapl.objective_config import TERMS, ObjectiveConfig

MEASURED = {
    "demonstration": "expert/nll",
    "adversarial": "discriminator/gap",
    "kl": "kl/reference",
}
"""The metric that a lagrangian weight holds at its target, by term."""


class Controllers:
    """The coefficients mu, lambda and beta, and the weight of the preference term.

    A lagrangian coefficient follows projected dual ascent: c <- clip(c + rate (measured - target), min, max) after
    every step, so that it grows while its constraint `measured <= target` is violated.
    """

    def __init__(self, objective: ObjectiveConfig) -> None:
        self._objective = objective
        coefficients = objective.coefficients.items()
        self._lagrangian = {term: c.value for term, c in coefficients if c.kind == "lagrangian"}

    def weights(self, step: int) -> dict[str, float]:
        """The weight of every term at optimizer step `step`, from 0."""
        return {term: self._weight(term, step) for term in TERMS}

    def _weight(self, term: str, step: int) -> float:
        fixed = self._objective.weight_at(term, step)
        if fixed is not None:
            return fixed
        if term in self._lagrangian:
            return self._lagrangian[term]
        return max(0.0, 1.0 - self._weight("demonstration", step))  # the complement of a lagrangian weight

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Move the lagrangian weights by what was measured in optimizer step `step`.

        What was not measured (no data of its kind in this step) leaves its weight as it is, and so does the
        warm-up of a co-trained discriminator, in which the adversarial weight is 0.

        Raises:
            ValueError: a measurement is not finite; no weight has moved then.
        """
        moved = {}
        for term, value in self._lagrangian.items():
            measured = metrics.get(MEASURED[term])
            if measured is None or self._objective.weight_at(term, step) is not None:
                continue
            if not math.isfinite(measured):
                raise ValueError(f"step {step + 1}: {MEASURED[term]} is {measured}, the {term} weight cannot follow it")
            c = self._objective.coefficients[term]
            moved[term] = min(c.max, max(c.min, value + c.rate * (measured - c.target)))
        self._lagrangian |= moved

    def state_dict(self) -> dict[str, float]:
        """The lagrangian weights by term; everything else follows from configuration and step."""
        return dict(self._lagrangian)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: the state is of other terms than the lagrangian ones of this configuration.
        """
        if state.keys() != self._lagrangian.keys():
            saved, configured = ", ".join(state) or "none", ", ".join(self._lagrangian) or "none"
            raise ValueError(f"saved lagrangian weights: {saved}; the configuration has: {configured}")
        self._lagrangian = dict(state)
