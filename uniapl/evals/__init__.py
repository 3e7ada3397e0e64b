"""Benchmarks and shards that a model is evaluated on: prompts, verdicts, scores."""
