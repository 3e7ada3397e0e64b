"""How full the learner's rows are on the local data set, with the settings of `make run`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.passes import packed_micro_batches, row_sizes
from uniapl.config import Config, load_config
from uniapl.data.encoding import ChatEncoder
from uniapl.data.local_dataset import PLAIN_RESPONSES
from uniapl.data.local_model import load_tokenizer
from uniapl.data.plain_responses import read_plain_responses
from uniapl.data.sources import open_sources
from uniapl.objective.rows import make_rows
from uniapl.objective.sequences import training_sequences
from uniapl.records import Group, MixedBatch, Sample, Score, VersionSpan

ROOT = Path(__file__).parent.parent
STEPS = 20
WEIGHTS = {"demonstration": 0.5, "preference": 0.5, "adversarial": 0.1, "kl": 0.0}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """configs/local.yaml with the model's tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer().save_pretrained(folder)
    shards = [f'["{ROOT}/data/local/train-*.arrow"]', f'["{ROOT}/data/local/heldout.arrow"]']
    overrides = [f"model.path={folder}", f"data.train={shards[0]}", f"data.heldout={shards[1]}"]
    return load_config(ROOT / "configs" / "local.yaml", overrides)


def responses(config: Config) -> Iterator[list[int]]:
    """Token ids of what the model really said, cut where a rollout engine would cut them."""
    encoder = ChatEncoder.from_folder(Path(config.model.path))
    texts = (s.text for samples in read_plain_responses(ROOT / "data/local" / PLAIN_RESPONSES) for s in samples.samples)
    for text in itertools.cycle(texts):
        yield encoder.response_ids(text)[: config.rollout.max_tokens]


def batches(config: Config) -> Iterator[MixedBatch]:
    prompts, demonstrations = open_sources(config)
    said = responses(config)
    for step in range(STEPS):
        groups = []
        for g in range(config.queue.groups_per_step):
            drawn = [next(said) for _ in range(config.rollout.group_size)]
            samples = [
                Sample(
                    ids,
                    [-1.0] * len(ids),
                    [VersionSpan(0, len(ids), step)],
                    "",
                    "stop",
                    Score(float(i % 2), expert_score=0.1),
                )
                for i, ids in enumerate(drawn)
            ]
            groups.append(Group(g, prompts.next(), samples, "a"))
        yield MixedBatch(step, groups, [demonstrations.next() for _ in range(config.queue.demonstrations_per_step)])


def test_nine_tenths_of_the_rows_tokens_are_real(config: Config) -> None:
    """As the learner packs and counts them, over twenty steps."""
    sizes: Counter[str] = Counter()
    for batch in batches(config):
        sequences = training_sequences(batch, config.objective, 1.0, WEIGHTS, config.rollout.max_tokens)
        assert len(sequences) == 8 * 4 + 16
        for micro_batch in packed_micro_batches(sequences, config.learner):
            sizes.update(row_sizes(micro_batch, make_rows(micro_batch)))
    assert 0.9 <= sizes["tokens/computed"] / sizes["tokens/rows"] <= 1.0
