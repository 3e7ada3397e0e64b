"""The objective's part of the configuration: weights, what a step needs, and what the user reads when it is wrong."""

import pytest

from uniapl.config import load_config
from uniapl.config_errors import ConfigError
from uniapl.objective_config import Coefficient

SMALLEST = "model: {path: m}\ndata: {train: [t.arrow], heldout: [h.arrow]}\n"
TEXT = "one line of 1 to 4095 characters, without control characters"
OBJECTIVE = "preference, demonstration, adversarial, kl, surrogate, diagnostics_every"
COEFFICIENT = "kind, value, end, warmup_steps, steps, target, rate, min, max"
WEIGHT = f"a number >= 0 or a section with the keys {COEFFICIENT}"
KINDS = "'constant' or 'schedule' or 'switch' or 'complement' or 'lagrangian'"
AVERAGE = "'token' or 'sequence' or 'constant'"

# (override, what follows "override: ")
VALUES = [
    (
        "objective.preference.weights=1",
        "objective.preference.weights: unknown key; did you mean 'weight'? "
        "allowed: weight, clip_low, clip_high, advantage_std, average",
    ),
    ("objective=[]", f"objective: got []; allowed: a section with the keys {OBJECTIVE}"),
    (
        "objective.demonstration=1",
        "objective.demonstration: got 1; allowed: a section with the keys weight, token_weight",
    ),
    (
        "objective.surrogate.flor=0",
        "objective.surrogate.flor: unknown key; did you mean 'floor'? allowed: ratio, proximal, correction, cap, floor",
    ),
    ("objective.preference.clip_low=1", "objective.preference.clip_low: got 1; allowed: a number > 0 and < 1"),
    ("objective.surrogate.cap=0.5", "objective.surrogate.cap: got 0.5; allowed: a number >= 1"),
    ("objective.surrogate.floor=2", "objective.surrogate.floor: got 2; allowed: a number >= 0 and <= 1"),
    (
        "objective.adversarial.cotrained.learning_rate=0",
        "objective.adversarial.cotrained.learning_rate: got 0; allowed: a number > 0",
    ),
    (
        "objective.adversarial.cotrained.warmup_steps=-1",
        "objective.adversarial.cotrained.warmup_steps: got -1; allowed: a whole number >= 0",
    ),
    ("objective.diagnostics_every=-1", "objective.diagnostics_every: got -1; allowed: a whole number >= 0"),
    # weights: a number or a section
    *(
        (f"objective.{term}.weight={text}", f"objective.{term}.weight: got {shown}; allowed: {WEIGHT}")
        for term in ("preference", "demonstration", "adversarial", "kl")
        for text, shown in [("-0.5", "-0.5"), ("x", "'x'")]
    ),
    ("objective.kl.weight=.inf", f"objective.kl.weight: got inf; allowed: {WEIGHT}"),
    ("objective.kl.weight=.nan", f"objective.kl.weight: got nan; allowed: {WEIGHT}"),
    ("objective.kl.weight=true", f"objective.kl.weight: got true; allowed: {WEIGHT}"),
    ("objective.kl.weight=null", f"objective.kl.weight: got null; allowed: {WEIGHT}"),
    ("objective.kl.weight={kind: cosine}", f"objective.kl.weight.kind: got 'cosine'; allowed: {KINDS}"),
    (
        "objective.kl.weight={kin: schedule}",
        f"objective.kl.weight.kin: unknown key; did you mean 'kind'? allowed: {COEFFICIENT}",
    ),
    ("objective.kl.weight.value=-1", "objective.kl.weight.value: got -1; allowed: a number >= 0"),
    ("objective.kl.weight.end=-1", "objective.kl.weight.end: got -1; allowed: a number >= 0"),
    ("objective.kl.weight.warmup_steps=-1", "objective.kl.weight.warmup_steps: got -1; allowed: a whole number >= 0"),
    ("objective.kl.weight.steps=0", "objective.kl.weight.steps: got 0; allowed: a whole number > 0"),
    ("objective.kl.weight.target=.inf", "objective.kl.weight.target: got inf; allowed: a finite number"),
    ("objective.kl.weight.rate=-1", "objective.kl.weight.rate: got -1; allowed: a number >= 0"),
    ("objective.kl.weight.min=-1", "objective.kl.weight.min: got -1; allowed: a number >= 0"),
    ("objective.kl.weight.max=.inf", "objective.kl.weight.max: got inf; allowed: a finite number >= 0"),
    ("objective.adversarial.as_reward=1", "objective.adversarial.as_reward: got 1; allowed: true or false"),
    ("objective.adversarial.advantage_std=1", "objective.adversarial.advantage_std: got 1; allowed: true or false"),
    *(
        (f"objective.{term}.average=mean", f"objective.{term}.average: got 'mean'; allowed: {AVERAGE}")
        for term in ("preference", "adversarial")
    ),
    (
        "objective.demonstration.token_weight=phi",
        "objective.demonstration.token_weight: got 'phi'; allowed: 'uniform' or 'p_one_minus_p'",
    ),
    ("objective.surrogate.ratio=word", "objective.surrogate.ratio: got 'word'; allowed: 'token' or 'sequence'"),
    (
        "objective.surrogate.proximal=old",
        "objective.surrogate.proximal: got 'old'; allowed: 'step_start' or 'behaviour'",
    ),
    (
        "objective.surrogate.correction=clip",
        "objective.surrogate.correction: got 'clip'; allowed: 'truncate' or 'mask' or 'sequence' or 'off'",
    ),
    (
        "objective.adversarial.discriminator=gan",
        "objective.adversarial.discriminator: got 'gan'; "
        "allowed: 'none' or 'embedding' or 'reference_reward' or 'cotrained' or the user's own module:Class",
    ),
    # paths that may be null
    ("objective.kl.reference=''", f"objective.kl.reference: got ''; allowed: null or {TEXT}"),
    ("objective.adversarial.reward_model=3", f"objective.adversarial.reward_model: got 3; allowed: null or {TEXT}"),
    (
        "objective.adversarial.cotrained.model=''",
        f"objective.adversarial.cotrained.model: got ''; allowed: null or {TEXT}",
    ),
]

# (overrides, the whole message)
CONFLICTS = [
    (
        ["objective.preference.weight=0"],
        "override: objective: every weight is 0, nothing would be trained; allowed: at least one weight > 0",
    ),
    (
        ["objective.adversarial={weight: 1, discriminator: none}"],
        "override: objective.adversarial.discriminator: got 'none'; "
        "allowed: 'embedding', 'reference_reward', 'cotrained' or module:Class when the weight is > 0",
    ),
    (
        ["objective.adversarial={weight: {kind: lagrangian}, discriminator: none}"],
        "override: objective.adversarial.discriminator: got 'none'; "
        "allowed: 'embedding', 'reference_reward', 'cotrained' or module:Class when the weight is > 0",
    ),
    (
        ["objective.adversarial={weight: 1, discriminator: reference_reward, reward_model: null}"],
        "override: objective.adversarial.reward_model: got null; "
        "allowed: a folder when the discriminator is 'reference_reward'",
    ),
    (
        [
            "objective.preference.weight=0",
            "objective.demonstration.weight=1",
            "objective.adversarial={weight: 1, discriminator: embedding, as_reward: true}",
        ],
        "override: objective.adversarial.as_reward: got true; allowed: false when objective.preference.weight is 0",
    ),
    (
        [
            "queue.on_equal_rewards=resample",
            "objective.adversarial={weight: 1, discriminator: embedding, as_reward: true}",
        ],
        "override: queue.on_equal_rewards: got 'resample'; allowed: 'keep' when objective.adversarial.as_reward is "
        "true: the expert score tells samples of equal reward apart",
    ),
    *(
        (
            [f"objective.{term}={{weight: {{kind: complement}}, {more}}}"],
            f"override: objective.{term}.weight.kind: got 'complement'; allowed: in objective.preference.weight only",
        )
        for term, more in [
            ("demonstration", "token_weight: uniform"),
            ("adversarial", "discriminator: embedding"),
            ("kl", "reference: folder"),
        ]
    ),
    (
        ["objective.preference.weight={kind: lagrangian, value: 1}"],
        "override: objective.preference.weight.kind: got 'lagrangian'; allowed: in the weights of the other terms",
    ),
    (
        ["objective.demonstration.weight={kind: lagrangian, min: 2, max: 1}"],
        "override: objective.demonstration.weight.min: got 2; allowed: <= max = 1",
    ),
    (
        ["objective.demonstration.weight={kind: lagrangian, value: 0.1, min: 0.2, max: 1}"],
        "override: objective.demonstration.weight.value: got 0.1; allowed: from min = 0.2 to max = 1",
    ),
    (
        ["objective.kl.weight={kind: lagrangian, value: 11}"],
        "override: objective.kl.weight.value: got 11; allowed: from min = 0 to max = 10",
    ),
    (
        ["objective.demonstration.weight={kind: schedule, value: 1, warmup_steps: 30, steps: 20}"],
        "override: objective.demonstration.weight.warmup_steps: got 30; allowed: <= steps = 20",
    ),
]


@pytest.fixture
def smallest(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(SMALLEST)
    return path


def load(path, overrides):
    return load_config(path, list(overrides))


@pytest.mark.parametrize(("override", "expected"), VALUES, ids=[override for override, _ in VALUES])
def test_a_wrong_value_is_one_line_with_key_value_and_what_is_allowed(smallest, override, expected):
    with pytest.raises(ConfigError) as raised:
        load(smallest, [override])
    assert str(raised.value) == f"override: {expected}"


@pytest.mark.parametrize(("overrides", "expected"), CONFLICTS, ids=[o[-1] for o, _ in CONFLICTS])
def test_values_that_cannot_go_together_are_named_with_their_bound(smallest, overrides, expected):
    with pytest.raises(ConfigError) as raised:
        load(smallest, overrides)
    assert str(raised.value) == expected


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0.25", {"value": 0.25}),
        ("2", {"value": 2.0}),
        ("{value: 0.25}", {"value": 0.25}),
        ("{kind: schedule, value: 0.9, end: 0.05}", {"kind": "schedule", "value": 0.9, "end": 0.05}),
        ("{kind: switch, value: 1, steps: 7}", {"kind": "switch", "value": 1.0, "steps": 7}),
        ("{kind: lagrangian, target: -1.5, max: 3}", {"kind": "lagrangian", "target": -1.5, "max": 3.0}),
    ],
)
@pytest.mark.parametrize("term", ["demonstration", "kl"])
def test_a_weight_is_a_number_or_a_section(smallest, term, text, wanted):
    found = load(smallest, [f"objective.{term}.weight={text}"]).objective.coefficients[term]
    assert found == Coefficient(**wanted)


MU, PREF = "objective.demonstration.weight", "objective.preference.weight"
SWITCH = "{kind: switch, value: 1, end: 0, steps: 5}"
ADVERSARIAL = "objective.adversarial={weight: 0.1, discriminator: embedding}"
COTRAINED = "objective.adversarial={weight: 0.1, discriminator: cotrained, cotrained: {warmup_steps: 9}}"


@pytest.mark.parametrize(
    ("overrides", "rollouts", "demonstrations"),
    [  # at steps 0 and 5
        ([], [True, True], [False, False]),
        ([f"{PREF}=0", f"{MU}=1"], [False, False], [True, True]),
        ([f"{PREF}=0", f"{MU}=1", ADVERSARIAL], [True, True], [True, True]),
        ([f"{PREF}=0", f"{MU}=1", "objective.kl.weight=0.1"], [True, True], [True, True]),
        ([f"{PREF}={{kind: complement}}", f"{MU}={SWITCH}"], [False, True], [True, False]),
        ([f"{PREF}={{kind: complement}}", f"{MU}=1"], [False, False], [True, True]),
        ([f"{PREF}={{kind: complement}}", f"{MU}={{kind: lagrangian}}"], [True, True], [True, True]),
        ([f"{PREF}={{kind: schedule, value: 0, end: 1, steps: 9}}", f"{MU}=1"], [False, True], [True, True]),
        # A discriminator learns from rollouts before the term counts.
        ([f"{PREF}=0", f"{MU}=1", COTRAINED], [True, True], [True, True]),
    ],
)
def test_what_a_step_and_the_whole_run_may_need(smallest, overrides, rollouts, demonstrations):
    objective = load(smallest, overrides).objective
    assert [objective.rollouts_at(step) for step in (0, 5)] == rollouts
    assert [objective.demonstrations_at(step) for step in (0, 5)] == demonstrations
    assert (objective.uses_rollouts, objective.uses_demonstrations) == (any(rollouts), any(demonstrations))
