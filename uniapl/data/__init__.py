"""Data: shards on disk, read as prompts and demonstrations, and the local data set that ships with the project."""
