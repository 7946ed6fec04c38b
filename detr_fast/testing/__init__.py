"""What tests of kernels and of models that use them need: an accuracy rule, counters, checks around the interpreter."""

from __future__ import annotations

from detr_fast.testing.accuracy import assert_as_accurate_as_eager, assert_close_to_truth
from detr_fast.testing.counters import Counts, count, counting

__all__ = ["assert_as_accurate_as_eager", "assert_close_to_truth", "Counts", "count", "counting"]
