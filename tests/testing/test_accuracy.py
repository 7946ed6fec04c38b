"""The accuracy rule itself: it forgives eager's luck over a handful of elements, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detr_fast.testing import accuracy
from detr_fast.testing.accuracy import assert_as_accurate_as_eager


def eager(x):
    return F.layer_norm(x, x.shape[-1:])


def by_the_formula(x):
    """As accurate as eager's, with other roundings."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def judge(function, rows, columns, seed, **options):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 1e3 + 1e3
    assert_as_accurate_as_eager(function, reference=eager, inputs=[x], dtype=torch.float32, **options)


def refused(function, rows, columns):
    """How many of 60 cases are refused."""
    count = 0
    for seed in range(60):
        try:
            judge(function, rows, columns, seed)
        except AssertionError:
            count += 1
    return count


def test_few_elements_are_not_judged_by_one_rounding_of_eagers(monkeypatch):
    assert refused(by_the_formula, 1, 2) == 0
    monkeypatch.setattr(accuracy, "FEW_ELEMENTS", 0)
    assert refused(by_the_formula, 1, 2) > 0


def test_an_error_well_over_eagers_is_refused_whatever_the_size():
    def wrong(x):
        return by_the_formula(x) * (1 + 1e-5)

    for rows, columns in ((1, 3), (1, 64), (64, 64)):
        with pytest.raises(AssertionError, match="output 0: largest error"):
            judge(wrong, rows, columns, 0)


def test_three_times_eagers_error_is_refused_where_elements_are_many():
    def three_times(x):
        truth = eager(x.double())
        return (truth + 3 * (eager(x).double() - truth)).float() if x.dtype == torch.float32 else truth

    x = torch.randn(64, 64) + 1e4  # errors of eager that a rounding of the result leaves visible
    with pytest.raises(AssertionError, match="over 2 × eager's"):
        assert_as_accurate_as_eager(three_times, reference=eager, inputs=[x], dtype=torch.float32, grad=False)


def test_a_gradient_that_is_not_finite_is_refused():
    with pytest.raises(AssertionError, match="NaN or inf where"):
        judge(lambda x: by_the_formula(x) / 0.0, 2, 8, 0, grad=False)
