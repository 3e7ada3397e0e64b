"""`uniapl data inspect`: `measure` walks over shards, `samples` shows rows as the model sees them, `show` prints."""
