"""What tests of kernels and of models that use them need: an accuracy rule, counters, checks around the interpreter."""

from __future__ import annotations

from detr_fast.testing.accuracy import assert_as_accurate_as_eager as assert_as_accurate_as_eager
from detr_fast.testing.accuracy import assert_close_to_truth as assert_close_to_truth
from detr_fast.testing.counters import Counts as Counts
from detr_fast.testing.counters import count as count
from detr_fast.testing.counters import counting as counting
