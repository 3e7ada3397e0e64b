"""What is wrong with a user's data, in one line."""

from __future__ import annotations


class DataError(ValueError):
    """A file, a row or a tokenizer that cannot be used; the message names it and what is allowed.

    `reason` is the short name under which a skipped row is counted, such as `empty response`.
    """

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(" ".join(message.split()))
        self.reason = reason

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str]]:
        """Keeps `reason` when the error crosses a process boundary."""
        return type(self), (str(self), self.reason)
