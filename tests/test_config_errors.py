"""What the user reads when the configuration is wrong: exactly one line per wrong key or value."""

import pytest

from uniapl.config import load_config
from uniapl.config_errors import MAX_YAML_BYTES, ConfigError

SMALLEST = "model: {path: m}\ndata: {train: [t.arrow], heldout: [h.arrow]}\n"
SECTIONS = "run, model, data, rollout, reward, queue, objective, learner, evaluation, logging, cluster"
RUN = "name, seed, steps, folder, scratch, checkpoint_every, keep_last, keep_every, max_restarts, grace_seconds"
DATA = "train, heldout, on_bad_row, max_prompt_tokens, max_response_tokens"
NAME = "text of at most 100 letters, digits, '.', '_' and '-', the first a letter or digit"
TEXT = "one line of 1 to 4095 characters, without control characters"
REWARD = "a section with the keys name, weight, version"
URL = "null or a URL that begins with redis://, rediss:// or unix://"
BETAS = "a list with exactly 2 entries, each a number >= 0 and < 1"
SEED = "a whole number >= 0 and < 4294967296"

# (override, what follows "override: ")
VALUES = [
    # unknown keys, at every level
    ("rum.name=x", f"rum: unknown key; did you mean 'run'? allowed: {SECTIONS}"),
    ("zzz=1", f"zzz: unknown key; allowed: {SECTIONS}"),
    ("run.stpes=4", f"run.stpes: unknown key; did you mean 'steps'? allowed: {RUN}"),
    (
        "reward.functions=[{name: a, wieght: 1}]",
        "reward.functions.0.wieght: unknown key; did you mean 'weight'? allowed: name, weight, version",
    ),
    # a section is not a value
    ("run=3", f"run: got 3; allowed: a section with the keys {RUN}"),
    ("data=null", f"data: got null; allowed: a section with the keys {DATA}"),
    ("run.steps.x=1", "run.steps: got {'x': 1}; allowed: a whole number > 0"),
    # names and paths
    ("run.name=../x", f"run.name: got '../x'; allowed: {NAME}"),
    ("run.name=/etc/x", f"run.name: got '/etc/x'; allowed: {NAME}"),
    ("run.name=.hidden", f"run.name: got '.hidden'; allowed: {NAME}"),
    ("run.name=a b", f"run.name: got 'a b'; allowed: {NAME}"),
    (r'run.name="a\n"', rf"run.name: got 'a\n'; allowed: {NAME}"),
    ("run.name=3", f"run.name: got 3; allowed: {NAME}"),
    ("run.name=", f"run.name: got null; allowed: {NAME}"),
    (f"run.name={'x' * 101}", f"run.name: got '{'x' * 76}...; allowed: {NAME}"),
    ("run.folder=''", f"run.folder: got ''; allowed: {TEXT}"),
    (r'run.folder="a\0b"', rf"run.folder: got 'a\x00b'; allowed: {TEXT}"),
    ("model.path=null", f"model.path: got null; allowed: {TEXT}"),
    # whole numbers
    ("run.keep_every=-1", "run.keep_every: got -1; allowed: a whole number >= 0"),
    ("run.grace_seconds=0", "run.grace_seconds: got 0; allowed: a number > 0"),
    ("run.steps=0", "run.steps: got 0; allowed: a whole number > 0"),
    ("run.steps=ten", "run.steps: got 'ten'; allowed: a whole number > 0"),
    ("run.steps='3'", "run.steps: got '3'; allowed: a whole number > 0"),
    ("run.steps=3.0", "run.steps: got 3.0; allowed: a whole number > 0"),
    ("run.steps=true", "run.steps: got true; allowed: a whole number > 0"),
    ("run.steps=null", "run.steps: got null; allowed: a whole number > 0"),
    ("run.steps=1_000", "run.steps: got '1_000'; allowed: a whole number > 0"),
    ("run.seed=-1", f"run.seed: got -1; allowed: {SEED}"),
    ("run.seed=4294967296", f"run.seed: got 4294967296; allowed: {SEED}"),
    ("run.seed=.inf", f"run.seed: got inf; allowed: {SEED}"),
    # numbers
    ("learner.learning_rate='1e-5'", "learner.learning_rate: got '1e-5'; allowed: a number > 0"),
    ("learner.learning_rate=false", "learner.learning_rate: got false; allowed: a number > 0"),
    ("learner.learning_rate=.nan", "learner.learning_rate: got nan; allowed: a finite number > 0"),
    ("learner.max_grad_norm=.inf", "learner.max_grad_norm: got inf; allowed: a finite number > 0"),
    ("queue.lease_s=10s", "queue.lease_s: got '10s'; allowed: a number > 0"),
    ("rollout.temperature=0", "rollout.temperature: got 0; allowed: a number > 0 and <= 10"),
    ("rollout.top_p=1.5", "rollout.top_p: got 1.5; allowed: a number > 0 and <= 1"),
    ("queue.group_timeout_s=0", "queue.group_timeout_s: got 0; allowed: null or a number > 0"),
    ("queue.on_straggler=wait", "queue.on_straggler: got 'wait'; allowed: 'accept' or 'reissue'"),
    ("queue.min_group=1", "queue.min_group: got 1; allowed: a whole number >= 2"),
    ("queue.max_resamples=-1", "queue.max_resamples: got -1; allowed: a whole number >= 0"),
    # true or false, choices
    ("queue.on_equal_rewards=drop", "queue.on_equal_rewards: got 'drop'; allowed: 'keep' or 'resample'"),
    ("logging.tensorboard=yes", "logging.tensorboard: got 'yes'; allowed: true or false"),
    ("logging.tensorboard=1", "logging.tensorboard: got 1; allowed: true or false"),
    ("learner.dtype=float16", "learner.dtype: got 'float16'; allowed: 'float32' or 'bfloat16'"),
    ("data.on_bad_row=ignore", "data.on_bad_row: got 'ignore'; allowed: 'error' or 'skip'"),
    # lists
    ("data.train=[]", f"data.train: got []; allowed: a list with at least 1 entry, each {TEXT}"),
    ("data.train=x.arrow", f"data.train: got 'x.arrow'; allowed: a list with at least 1 entry, each {TEXT}"),
    ("data.train=[a, 1]", f"data.train.1: got 1; allowed: {TEXT}"),
    ("data.heldout=null", f"data.heldout: got null; allowed: a list, each {TEXT}"),
    ("learner.betas=[0.9]", f"learner.betas: got [0.9]; allowed: {BETAS}"),
    ("learner.betas=0.9", f"learner.betas: got 0.9; allowed: {BETAS}"),
    ("learner.betas=[0.9, 1]", "learner.betas.1: got 1; allowed: a number >= 0 and < 1"),
    ("reward.functions=[]", f"reward.functions: got []; allowed: a list with at least 1 entry, each {REWARD}"),
    ("reward.functions=[ifeval]", f"reward.functions.0: got 'ifeval'; allowed: {REWARD}"),
    ("reward.functions=[{weight: 1}]", f"reward.functions.0.name: missing; required: {TEXT}"),
    ("reward.functions=[{name: a, weight: .nan}]", "reward.functions.0.weight: got nan; allowed: a finite number"),
    # addresses
    ("reward.redis_url=http://x", f"reward.redis_url: got 'http://x'; allowed: {URL}"),
    ("reward.redis_url=http://u:hunt@er2@x", f"reward.redis_url: got 'http://***@x'; allowed: {URL}"),
    ("cluster.address=head", "cluster.address: got 'head'; allowed: 'local', 'auto' or HOST:PORT"),
    ("cluster.address=", "cluster.address: got null; allowed: 'local', 'auto' or HOST:PORT"),
]

# (overrides, the whole message)
CONFLICTS = [
    (
        ["queue.groups_per_step=0"],
        "override: queue.groups_per_step: got 0; allowed: > 0 when any weight but the demonstrations' is > 0",
    ),
    (
        ["objective.demonstration.weight=1", "queue.demonstrations_per_step=0"],
        "override: queue.demonstrations_per_step: got 0; allowed: > 0 when objective.demonstration.weight is > 0",
    ),
    (
        ["rollout.group_size=1"],
        "override: rollout.group_size: got 1; allowed: >= 2, one sample has no advantage within its group",
    ),
    (["rollout.min_actors=2"], "override: rollout.min_actors: got 2; allowed: <= rollout.actors = 1"),
    (
        ["rollout.actors=3", "rollout.max_actors=2"],
        "override: rollout.max_actors: got 2; allowed: >= rollout.actors = 3",
    ),
    (
        ["rollout.max_model_len=500"],
        "override: rollout.max_model_len: got 500; allowed: >= data.max_prompt_tokens + rollout.max_tokens = 576",
    ),
    (
        ["learner.row_tokens=600"],
        "override: learner.row_tokens: got 600; allowed: >= the longest prompt and response together = 1024",
    ),
    (
        ["reward.min_replicas=3", "reward.max_replicas=2"],
        "override: reward.max_replicas: got 2; allowed: >= reward.min_replicas = 3",
    ),
    (
        ["reward.functions=[{name: a}, {name: a}]"],
        "override: reward.functions: got 'a' 2 times; allowed: each name once",
    ),
    (
        ["learner.warmup_steps=31"],
        "override: learner.warmup_steps: got 31; allowed: <= run.steps = 30",
    ),
    (
        ["data.heldout=[]"],
        "override: data.heldout: got []; allowed: at least one shard when evaluation.prompts is > 0",
    ),
    (
        ["queue.group_timeout_s=600"],
        "override: queue.group_timeout_s: got 600; allowed: < queue.lease_s = 600",
    ),
    (
        ["queue.on_straggler=accept", "queue.min_group=5"],
        "override: queue.min_group: got 5; allowed: <= rollout.group_size = 4",
    ),
    (
        ["queue.on_stale=correct", "objective.surrogate.correction=off"],
        "override: queue.on_stale: got 'correct'; allowed: when objective.surrogate corrects, "
        "by correction (not 'off') or proximal = 'behaviour'",
    ),
    (
        ["rollout.update_mode=wait"],
        "override: rollout.update_mode: got 'wait'; "
        "allowed: when queue.group_timeout_s (here 480) < cluster.broadcast_timeout_s = 120",
    ),
    (
        ["reward.redis_url=redis://me:hunter2@h:1/0"],
        "override: reward.redis_url: got 'redis://***@h:1/0'; "
        "allowed: no password, it is read from the environment: UNIAPL_REDIS_PASSWORD",
    ),
    (
        ["reward.redis_url=rediss://h/0?ssl_password=hunter2&db=1"],
        "override: reward.redis_url: got 'rediss://h/0?ssl_password=***&db=1'; "
        "allowed: no password, it is read from the environment: UNIAPL_REDIS_PASSWORD",
    ),
    (["reward.redis_url=redis://[h"], "override: reward.redis_url: got 'redis://[h'; Invalid IPv6 URL"),
    (
        ["rollout.group_size=1", "learner.warmup_steps=31"],
        "override: rollout.group_size: got 1; allowed: >= 2, one sample has no advantage within its group\n"
        "override: learner.warmup_steps: got 31; allowed: <= run.steps = 30",
    ),
]

SYNTAX = [
    ("foo", "override 'foo'; allowed: key.subkey=value"),
    ("=3", "override '=3'; allowed: key.subkey=value"),
    ("run..steps=3", "override 'run..steps=3'; allowed: key.subkey=value"),
    (".run=3", "override '.run=3'; allowed: key.subkey=value"),
    ("model.path.x=1", "override 'model.path.x=1': model.path is not a section; allowed: model.path=value"),
    ("data.train.0=x", "override 'data.train.0=x': data.train is not a section; allowed: data.train=value"),
    (
        "run.name=[",
        "override 'run.name=[': line 1: not valid YAML: while parsing a flow node, "
        "expected the node content, but found '<stream end>'",
    ),
    ("run.name=*a", "override 'run.name=*a': line 1: not valid YAML: aliases are not allowed"),
    (
        "run={steps: 1, steps: 2}",
        "override 'run={steps: 1, steps: 2}': line 1: not valid YAML: key 'steps' stands twice",
    ),
]

NEXT = "; allowed: plain YAML, with quotes around text that has special characters"
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
NO_DATA = f"data: missing; required: a section with the keys {DATA}"
MISSING = f"model: missing; required: a section with the keys path\nFILE: {NO_DATA}"

# (what the file holds, what follows its name)
FILES = [
    ("", MISSING),
    ("# nothing\n", MISSING),
    ("model: {path: m}\n", NO_DATA),
    ("model: {}\ndata: {train: [t]}\n", f"model.path: missing; required: {TEXT}"),
    ("just text\n", "the top level is text; allowed: a mapping of sections"),
    ("- a\n- b\n", "the top level is a list; allowed: a mapping of sections"),
    ("3\n", "the top level is a number; allowed: a mapping of sections"),
    ("true\n", "the top level is true or false; allowed: a mapping of sections"),
    ("1: x\n", "line 1: not valid YAML: key 1 is not text"),
    ("run:\n  true: x\n", "line 2: not valid YAML: key true is not text"),
    ("? [a]\n: x\n", "line 1: not valid YAML: key ['a'] is not text"),
    ("run: {name: x}\nrun: {name: y}\n", "line 2: not valid YAML: key 'run' stands twice"),
    ("run:\n  seed: 1\n  seed: 2\n", "line 3: not valid YAML: key 'seed' stands twice"),
    (
        "run:\n\tname: x\n",
        r"line 2: not valid YAML: while scanning for the next token, found character '\t' that cannot start any token",
    ),
    (
        "run: [1\nmodel: x\n",
        "line 2: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got ':'",
    ),
    (BOMB, "line 2: not valid YAML: aliases are not allowed"),
    (SMALLEST + '"a\\nb": 1\n', rf"'a\nb': unknown key; allowed: {SECTIONS}"),
    (SMALLEST + "run: {<<: {seed: 1}}\n", f"run.'<<': unknown key; allowed: {RUN}"),
    ("run: !!python/object/apply:os.system [x]\n", "line 1: not valid YAML: tags are not allowed"),
    (
        SMALLEST + "---\n" + SMALLEST,
        "line 3: not valid YAML: expected a single document in the stream, but found another document",
    ),
    ("[" * 5000, "not valid YAML: nested too deeply"),
    ("run: {seed: " + "1" * 5000 + "}\n", "line 1: not valid YAML: a whole number of more than 18 digits"),
    (b"run: \xff\xfe\n", "not UTF-8 text; allowed: a YAML file"),
    (b"run: \x00\n", "not valid YAML: unacceptable character #x0000: special characters are not allowed"),
    (b"#" * (MAX_YAML_BYTES + 1), "larger than 256 KiB; allowed: a configuration file"),
    (b"\xc3" * (MAX_YAML_BYTES + 1), "larger than 256 KiB; allowed: a configuration file"),
]


def message(path, overrides=(), methods=()):
    """What `load_config` says, with the file called FILE and its folder DIR."""
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides, methods)
    return str(raised.value).replace(str(path), "FILE").replace(str(path.parent), "DIR")


def told(expected):
    """With what to do next, which is the same whatever is wrong with YAML."""
    return expected + (NEXT if "not valid YAML" in expected else "")


@pytest.fixture
def smallest(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(SMALLEST)
    return path


@pytest.mark.parametrize(("override", "expected"), VALUES, ids=[override for override, _ in VALUES])
def test_a_wrong_value_is_one_line_with_key_value_and_what_is_allowed(smallest, override, expected):
    assert message(smallest, [override]) == f"override: {expected}"


@pytest.mark.parametrize(("overrides", "expected"), CONFLICTS, ids=[o[-1] for o, _ in CONFLICTS])
def test_values_that_cannot_go_together_are_named_with_their_bound(smallest, overrides, expected):
    assert message(smallest, overrides) == expected


@pytest.mark.parametrize(("override", "expected"), SYNTAX, ids=[override for override, _ in SYNTAX])
def test_a_malformed_override_is_quoted(smallest, override, expected):
    assert message(smallest, [override]) == told(expected)


@pytest.mark.parametrize(("content", "expected"), FILES, ids=[repr(c[:30]) for c, _ in FILES])
def test_a_malformed_file_is_named_with_the_line(tmp_path, content, expected):
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message(path) == told(f"FILE: {expected}")


def test_every_wrong_key_of_a_file_has_its_line(smallest):
    smallest.write_text(SMALLEST + "run: {stpes: 4, seed: -1}\nlearner: {ranks: 0}\n")
    assert message(smallest).splitlines() == [
        f"FILE: run.seed: got -1; allowed: {SEED}",
        f"FILE: run.stpes: unknown key; did you mean 'steps'? allowed: {RUN}",
        "FILE: learner.ranks: got 0; allowed: a whole number > 0",
    ]


@pytest.mark.parametrize("name", ["missing.yaml", "folder"])
def test_a_file_that_cannot_be_read_says_why(tmp_path, name):
    (tmp_path / "folder").mkdir()
    why = {"missing.yaml": "No such file or directory", "folder": "Is a directory"}[name]
    assert message(tmp_path / name) == f"FILE: {why}; allowed: a readable YAML file"


def test_an_endless_file_is_read_only_up_to_the_limit():
    with pytest.raises(ConfigError, match=r"^/dev/zero: larger than 256 KiB; allowed: a configuration file$"):
        load_config("/dev/zero")


@pytest.mark.parametrize("method", ["nope", "../config", ""])
def test_an_unknown_method_lists_those_there_are(smallest, method):
    expected = f"--method: got '{method}'; allowed: a .yaml file, or one in DIR/methods"
    assert message(smallest, methods=[method]) == f"{expected}: none"
    (smallest.parent / "methods").mkdir()
    for name in ("sft", "grpo"):
        (smallest.parent / f"methods/{name}.yaml").write_text("")
    assert message(smallest, methods=[method]) == f"{expected}: grpo, sft"


def test_a_wrong_value_is_blamed_on_the_layer_that_set_it(smallest):
    (smallest.parent / "methods").mkdir()
    (smallest.parent / "methods/bad.yaml").write_text("run: {seed: -1}\nqueue: {groups: 3}\nlearner: {ranks: 0}\n")
    smallest.write_text(SMALLEST + "run: {steps: 0, seed: 1}\n")
    assert message(smallest, ["learner.ranks=-1"], ["bad"]).splitlines() == [
        f"DIR/methods/bad.yaml: run.seed: got -1; allowed: {SEED}",
        "FILE: run.steps: got 0; allowed: a whole number > 0",
        "DIR/methods/bad.yaml: queue.groups: unknown key; did you mean 'min_group'? "
        "allowed: groups_per_step, demonstrations_per_step, max_staleness, on_stale, lease_s, group_timeout_s, "
        "on_straggler, min_group, max_reissues, max_regenerations, on_equal_rewards, max_resamples",
        "override: learner.ranks: got -1; allowed: a whole number > 0",
    ]
