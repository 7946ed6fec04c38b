"""Numbers as people read them."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """ "1 epoch", "2 boxes", "1,250 steps"."""
    plural = noun + ("es" if noun.endswith(("s", "x")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"
