"""The examples' promises, kept on a CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sorting_draws_sequences_of_all_lengths_and_their_sorted_targets():
    import torch

    example = load("sort_sequences")
    for source, target in zip(*example.draw(200, torch.device("cpu"))):
        numbers = source[source != example.PADDING].tolist()
        padding = [example.PADDING] * (example.LONGEST - len(numbers))
        assert source.tolist() == [*numbers, *padding]
        assert target.tolist() == [*sorted(numbers), example.EOS, *padding]
        assert all(3 <= number < example.VOCABULARY for number in numbers)


def test_the_digits_held_out_are_a_fifth_and_never_trained_on():
    images, labels, held_out, held_out_labels = load("digits").load(seed=0)
    assert len(images) + len(held_out) == len(labels) + len(held_out_labels) == 1797
    assert len(held_out) == 360
    assert held_out_labels.bincount().min() >= 34
    assert images.min() == 0.0
    assert images.max() == 1.0


@pytest.mark.slow
def test_sequences_are_sorted_exactly_in_at_least_99_of_100_cases(capsys):
    assert load("sort_sequences").main([]) >= 0.99
    assert "exactly sorted" in capsys.readouterr().out


@pytest.mark.slow
def test_at_least_96_of_100_held_out_digits_are_read():
    assert load("digits").main([]) >= 0.96
