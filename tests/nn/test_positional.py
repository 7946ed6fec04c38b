from __future__ import annotations

import math

import pytest
import torch

from detr_fast import nn


def test_sines_and_cosines_are_the_papers():
    tokens = torch.randn(2, 5, 6, dtype=torch.float64)
    positions = nn.SinusoidalPositionalEncoding(6, add=False)(tokens)
    assert positions.shape == (5, 6)
    for position in range(5):
        for pair in range(3):
            angle = position / 10_000 ** (2 * pair / 6)
            assert positions[position, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert positions[position, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)
    assert torch.equal(nn.SinusoidalPositionalEncoding(6)(tokens), tokens + positions)


@pytest.mark.parametrize("start", [3, torch.tensor([3]), torch.tensor(3)], ids=["number", "one element", "scalar"])
@pytest.mark.parametrize(
    "position",
    [nn.SinusoidalPositionalEncoding(4), nn.LearnedPositionalEmbedding(9, 4)],
    ids=lambda p: type(p).__name__,
)
def test_a_later_part_of_a_sequence_gets_its_own_positions(position, start):
    tokens = torch.randn(2, 8, 4)
    torch.testing.assert_close(position(tokens[:, 3:], start), position(tokens)[:, 3:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_positions_are_computed_precisely_and_have_the_tokens_dtype(dtype):
    tokens = torch.zeros(1, 400, 8, dtype=dtype)
    positions = nn.SinusoidalPositionalEncoding(8)(tokens)
    exact = nn.SinusoidalPositionalEncoding(8)(tokens.double())
    assert positions.dtype == dtype
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(positions.double(), exact, rtol=0.0, atol=tolerance)


def positions_step_by_step(mask, channels):
    """DETR's own, step by step, for one image: (H, W, 2 * channels), rows first."""
    height, width = mask.shape
    result = torch.zeros(height, width, 2 * channels)
    for row in range(height):
        for column in range(width):
            for axis, (line, index) in enumerate(((~mask[:, column], row), (~mask[row], column))):
                place = line[: index + 1].sum() / (line.sum() + 1e-6) * 2 * math.pi
                for pair in range(channels // 2):
                    angle = place / 10_000 ** (2 * pair / channels)
                    result[row, column, axis * channels + 2 * pair] = angle.sin()
                    result[row, column, axis * channels + 2 * pair + 1] = angle.cos()
    return result


def test_grids_have_detrs_positions_normalised_to_what_is_visible():
    tokens = torch.randn(2, 3, 5, 8)
    mask = torch.zeros(2, 3, 5, dtype=torch.bool)
    mask[1, 2:] = True
    mask[1, :, 3:] = True
    embedding = nn.SinePositionEmbedding2D(8, add=False)
    positions = embedding(tokens, mask)
    for image in range(2):
        torch.testing.assert_close(positions[image], positions_step_by_step(mask[image], 4))
    torch.testing.assert_close(embedding(tokens), positions[:1])
    assert torch.equal(nn.SinePositionEmbedding2D(8)(tokens, mask), tokens + positions)


def test_a_fully_padded_image_has_finite_positions():
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    assert nn.SinePositionEmbedding2D(4)(torch.zeros(1, 2, 2, 4), mask).isfinite().all()


def test_learned_positions_are_one_vector_for_each_place():
    sequence = nn.LearnedPositionalEmbedding(6, 4)
    grid = nn.LearnedPositionalEmbedding((3, 5), 4)
    assert list(sequence.state_dict()) == list(grid.state_dict()) == ["weight"]
    assert sequence.weight.std().item() == pytest.approx(0.02, rel=0.5)
    tokens = torch.randn(2, 4, 4)
    assert torch.equal(sequence(tokens), tokens + sequence.weight[:4])
    cells = torch.randn(2, 2, 5, 4)
    assert torch.equal(grid(cells), cells + grid.weight[:2])
    grid(cells).sum().backward()
    assert grid.weight.grad[:2].unique().tolist() == [2.0]
    assert grid.weight.grad[2].unique().tolist() == [0.0]
    assert nn.LearnedPositionalEmbedding((3, 5), 4, add=False)(cells).shape == (2, 5, 4)


def test_returned_positions_do_not_depend_on_the_tokens_channels():
    wide = torch.randn(2, 3, 5, 32)
    for position in (nn.SinusoidalPositionalEncoding, nn.SinePositionEmbedding2D):
        assert position(8, add=False)(wide).shape[-1] == 8
    with pytest.raises(ValueError, match=r"SinusoidalPositionalEncoding takes tokens \(…, L, 8\); got \(2, 3, 5, 32\)"):
        nn.SinusoidalPositionalEncoding(8)(wide)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.SinusoidalPositionalEncoding(5), "got d_model 5; expected an even number"),
        (lambda: nn.SinePositionEmbedding2D(6), "got d_model 6; expected a multiple of 4"),
        (
            lambda: nn.SinePositionEmbedding2D(4)(torch.zeros(2, 6, 4)),
            r"\(N, H, W, 4\), with their grid; got \(2, 6, 4\)",
        ),
        (
            lambda: nn.SinePositionEmbedding2D(4)(torch.zeros(1, 2, 3, 4), torch.zeros(1, 6, dtype=torch.bool)),
            r"the mask must be bool of shape \(1, 2, 3\), True = padding; got torch.bool \(1, 6\)",
        ),
        (
            lambda: nn.SinePositionEmbedding2D(4)(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)),
            r"must be bool .* got torch.float32 \(1, 2, 3\)",
        ),
        (lambda: nn.LearnedPositionalEmbedding((2, 3, 4), 4), "expected a length or .height, width."),
        (lambda: nn.LearnedPositionalEmbedding(0, 4), "got size 0; expected a length"),
        (
            lambda: nn.LearnedPositionalEmbedding(3, 4)(torch.zeros(1, 4, 4)),
            "tokens of 4 but learned positions go from 0 to 3",
        ),
        (lambda: nn.LearnedPositionalEmbedding(3, 4)(torch.zeros(1, 2, 4), 2), "tokens of 2 from 2 on but learned"),
        (lambda: nn.LearnedPositionalEmbedding(3, 4)(torch.zeros(1, 2, 4), -1), "tokens of 2 from -1 on"),
        (
            lambda: nn.LearnedPositionalEmbedding((2, 3), 4)(torch.zeros(1, 2, 4, 4)),
            "tokens of 2×4 but learned positions go from 0 to 2×3; use a larger size, or sines",
        ),
        (
            lambda: nn.LearnedPositionalEmbedding((2, 3), 4)(torch.zeros(3, 4)),
            r"takes tokens \(…, H, W, 4\); got \(3, 4\)",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_told_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_position_says_how_it_was_made():
    assert repr(nn.SinusoidalPositionalEncoding(8)) == "SinusoidalPositionalEncoding(8)"
    assert repr(nn.SinePositionEmbedding2D(8, add=False)) == "SinePositionEmbedding2D(8, add=False)"
    assert repr(nn.LearnedPositionalEmbedding((3, 4), 8)) == "LearnedPositionalEmbedding((3, 4), 8)"
