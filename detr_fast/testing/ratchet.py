"""A file of numbers that may only get better: a worse one fails, a better one is written down.

Numbers are kept as {case: {measure: number}}, smaller is better. In CI (CI=true) nothing is written, and an improvement that
the file does not know fails too: else the next change could lose it again unseen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

Numbers = Mapping[str, Mapping[str, int]]


class Ratchet:
    """The numbers in the file `path`; `command` is what a reader should run to update it."""

    def __init__(self, path: Path, command: str) -> None:
        self.path = path
        self.command = command

    def recorded(self) -> dict[str, dict[str, int]]:
        """What the file holds; nothing where there is no file yet."""
        return json.loads(self.path.read_text()) if self.path.is_file() else {}

    def check(self, found: Numbers) -> bool:
        """Compare `found` with the file and write what is better or new; returns whether the file has changed.

        Raises AssertionError where a number is worse, naming all that are, and in CI where the file needs an update.
        """
        known = self.recorded()
        worse = [
            f"{case}: {measure} {number:,}, was {known[case][measure]:,}"
            for case, numbers in found.items()
            for measure, number in numbers.items()
            if number > known.get(case, {}).get(measure, number)
        ]
        if worse:
            raise AssertionError(
                f"worse than {self.path.name} allows:\n  "
                + "\n  ".join(worse)
                + f"\nMend it; or, where the price buys something better, delete the case from {self.path.name}, "
                f"run '{self.command}', and say in the commit what it buys."
            )
        new = {case: dict(numbers) for case, numbers in found.items()}
        if new == known:
            return False
        if os.environ.get("CI", "").lower() in ("1", "true"):
            changed = sorted(case for case in new.keys() | known.keys() if new.get(case) != known.get(case))
            raise AssertionError(
                f"better or other cases than in {self.path.name} ({', '.join(changed)}): "
                f"run '{self.command}' and commit what it writes"
            )
        self.path.write_text(json.dumps(new, indent=1) + "\n")
        return True
