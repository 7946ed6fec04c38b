"""The error that every problem with a user's data raises."""

from __future__ import annotations


class DataError(ValueError):
    """A data set, image or annotation that cannot be used; one line naming the file, the value and the remedy."""

    def __init__(self, message: str) -> None:
        # DataLoader re-raises a worker's exception with the worker's traceback as its text; users get the last line.
        if message.startswith("Caught DataError in"):
            message = message.rstrip().rpartition("DataError: ")[2]
        super().__init__(message)
