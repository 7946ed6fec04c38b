from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from detr_fast import nn

DOUBLE = {"dtype": torch.float64}


def test_tokens_become_rows_of_the_weights_times_the_square_root_of_the_width():
    tokens = torch.tensor([[1, 4], [0, 2]], dtype=torch.int32)
    plain = nn.TokenEmbedding(5, 16, padding_idx=0, **DOUBLE)
    scaled = nn.TokenEmbedding(5, 16, padding_idx=0, scaled=True, **DOUBLE)
    assert torch.equal(plain(tokens), plain.weight[tokens.long()])
    assert torch.equal(scaled(tokens), 4.0 * scaled.weight[tokens.long()])
    assert plain(tokens)[1, 0].abs().max() == 0.0


@pytest.mark.parametrize("scaled", [False, True])
def test_tokens_start_with_unit_variance_scaled_or_not(scaled):
    embedding = nn.TokenEmbedding(2000, 64, scaled=scaled)
    assert embedding(torch.arange(2000)).std().item() == pytest.approx(1.0, rel=0.02)


def test_padding_gets_no_gradient_and_has_a_mask():
    embedding = nn.TokenEmbedding(5, 4, padding_idx=0)
    tokens = torch.tensor([[3, 0], [1, 2]])
    embedding(tokens).sum().backward()
    assert embedding.weight.grad[0].abs().max() == 0.0
    assert embedding.weight.grad[1:4].abs().min() == 1.0
    assert embedding.padding_mask(tokens).tolist() == [[False, True], [False, False]]
    assert nn.TokenEmbedding(5, 4).padding_mask(tokens) is None


def test_a_token_embedding_is_torch_nns_embedding_in_all_else():
    weights = torch.randn(5, 4)
    embedding = nn.TokenEmbedding.from_pretrained(weights, padding_idx=1)
    assert isinstance(embedding, torch.nn.Embedding)
    assert torch.equal(embedding(torch.tensor([4])), weights[4:])
    assert list(embedding.state_dict()) == ["weight"]
    assert repr(nn.TokenEmbedding(5, 4, 0, scaled=True)) == "TokenEmbedding(5, 4, padding_idx=0, scaled=True)"
    assert copy.deepcopy(nn.TokenEmbedding(5, 4, scaled=True)).scaled


def test_wrong_tokens_are_told_what_is_wrong():
    embedding = nn.TokenEmbedding(5, 4)
    with pytest.raises(IndexError, match=r"tokens must lie in \[0, 5\), the vocabulary; got ids from -2 to 7"):
        embedding(torch.tensor([7, -2]))
    with pytest.raises(TypeError, match=r"int32 or int64; got torch\.float32: use tokens\.long\(\)"):
        embedding(torch.ones(2))


def test_every_position_of_a_feature_map_becomes_a_token_row_by_row():
    feature_map = torch.randn(2, 3, 4, 5, **DOUBLE)
    embedding = nn.PixelEmbedding(3, 8, **DOUBLE)
    tokens = embedding(feature_map)
    assert tokens.shape == (2, 20, 8)
    expected = F.linear(feature_map[1, :, 2, 3], embedding.projection.weight, embedding.projection.bias)
    torch.testing.assert_close(tokens[1, 2 * 5 + 3], expected)
    embedding.flatten = False
    assert torch.equal(embedding(feature_map), tokens.view(2, 4, 5, 8))


@pytest.mark.parametrize(
    ("patch", "stride", "padding"), [(2, None, 0), (3, 2, 1), ((1, 4), (2, 3), (0, 3)), (5, 1, 4), (7, 7, 0)]
)
def test_patches_of_any_size_stride_and_padding_become_tokens_row_by_row(patch, stride, padding):
    images = torch.randn(2, 3, 7, 8, **DOUBLE)
    embedding = nn.PatchEmbedding(3, 6, patch, stride, padding, **DOUBLE)
    weight = embedding.projection.weight.flatten(1)
    patches = F.unfold(images, patch, padding=padding, stride=patch if stride is None else stride)
    expected = F.linear(patches.transpose(1, 2), weight, embedding.projection.bias)
    tokens = embedding(images)
    torch.testing.assert_close(tokens, expected)
    embedding.flatten = False
    assert torch.equal(embedding(images).flatten(1, 2), tokens)


@pytest.mark.parametrize(("patch", "stride", "padding"), [(2, None, 0), (3, 2, 1), (2, 1, 2)])
@pytest.mark.parametrize("flatten", [True, False])
def test_a_patch_is_padding_where_it_sees_no_pixel(patch, stride, padding, flatten):
    mask = torch.ones(2, 6, 6, dtype=torch.bool)
    mask[0, :3, :4] = False
    mask[1, :5, :2] = False
    embedding = nn.PatchEmbedding(1, 1, patch, stride, padding, flatten=flatten)
    with torch.no_grad():
        embedding.projection.weight.fill_(1.0)
        embedding.projection.bias.zero_()
        seen = embedding((~mask).float()[:, None])[..., 0] > 0
    assert torch.equal(embedding.token_mask(mask), ~seen)


def test_a_pixels_mask_has_the_tokens_order():
    mask = torch.rand(2, 3, 4) < 0.5
    assert torch.equal(nn.PixelEmbedding(1, 1).token_mask(mask), mask.flatten(1))
    assert torch.equal(nn.PixelEmbedding(1, 1, flatten=False).token_mask(mask), mask)


@pytest.mark.parametrize("embedding", [nn.PixelEmbedding(1, 4), nn.PatchEmbedding(1, 4, 2)])
@pytest.mark.parametrize("mask", [torch.ones(2, 4, 4, dtype=torch.long), torch.zeros(4, 4, dtype=torch.bool)])
def test_a_mask_of_numbers_is_refused_rather_than_read_as_no_padding(embedding, mask):
    with pytest.raises(ValueError, match=r"must be bool of shape \(N, H, W\), True = padding; got torch\.\w+ \("):
        embedding.token_mask(mask)


def test_wrong_images_are_told_what_is_wrong():
    patches = nn.PatchEmbedding(3, 4, (4, 8))
    with pytest.raises(ValueError, match=r"PatchEmbedding takes \(N, 3, H, W\); got \(2, 1, 8, 8\)$"):
        patches(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"got \(3, 8, 8\): add a batch dimension"):
        patches(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="images of 8×7 pixels hold no patch of 4×8; use larger images"):
        patches(torch.zeros(1, 3, 8, 7))
    with pytest.raises(ValueError, match=r"PixelEmbedding takes \(N, 3, H, W\); got \(2, 4\)"):
        nn.PixelEmbedding(3, 4)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="got stride=0; expected at least 1"):
        nn.PatchEmbedding(3, 4, 2, stride=0)
    with pytest.raises(ValueError, match=r"got padding=\(0, -1\); expected at least 0"):
        nn.PatchEmbedding(3, 4, 2, padding=(0, -1))


@pytest.mark.parametrize("size", [0, 1])
def test_empty_batches_and_single_pixels_pass(size):
    assert nn.TokenEmbedding(3, 4)(torch.zeros(2, size, dtype=torch.long)).shape == (2, size, 4)
    assert nn.PatchEmbedding(3, 4, 2)(torch.zeros(size, 3, 4, 4)).shape == (size, 4, 4)
    assert nn.PixelEmbedding(3, 4)(torch.zeros(size, 3, 1, 1)).shape == (size, 1, 4)


def test_embeddings_compile_into_one_graph():
    tokens = torch.tensor([[1, 2]])
    model = nn.Sequential(nn.TokenEmbedding(5, 4, padding_idx=0, scaled=True), nn.SinusoidalPositionalEncoding(4))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


def test_shifting_puts_bos_first_and_drops_the_last_target():
    targets = torch.tensor([[5, 6, 2], [7, 2, 0]])
    assert nn.shift_right(targets, 1).tolist() == [[1, 5, 6], [1, 7, 2]]
    assert nn.shift_right(targets[:, :1], 1).tolist() == [[1], [1]]
    assert nn.shift_right(targets[:, :0], 1).shape == (2, 0)
    with pytest.raises(ValueError, match=r"targets \(N, L\); got \(3,\)"):
        nn.shift_right(targets[0], 1)


def test_queries_are_learned_zeros_or_drawn_anew():
    memory = torch.zeros(2, 5, 4, dtype=torch.bfloat16)
    learned = nn.DecoderQueries(3, 4)
    assert torch.equal(learned(memory), learned.weight.bfloat16().expand(2, 3, 4))
    learned(memory.float()).sum().backward()
    assert learned.weight.grad.unique().tolist() == [2.0]
    zeros, drawn = nn.DecoderQueries(3, 4, "zeros"), nn.DecoderQueries(300, 4, "random")
    assert torch.equal(zeros(memory), torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    first, second = drawn(memory.float()), drawn(memory.float())
    assert first.std().item() == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(first, second)
    assert not [*zeros.parameters(), *drawn.parameters()]
    with pytest.raises(ValueError, match="got kind='noise'; expected one of learned, zeros, random"):
        nn.DecoderQueries(3, 4, "noise")
    with pytest.raises(ValueError, match="got 0 queries"):
        nn.DecoderQueries(0, 4)


def test_a_head_gives_probabilities_their_logarithms_and_their_cross_entropy():
    head = nn.LinearSoftmax(4, 7, **DOUBLE)
    x = torch.randn(2, 3, 4, **DOUBLE)
    targets = torch.tensor([[0, 6, -100], [2, 2, 3]])
    logits = F.linear(x, head.weight, head.bias)
    torch.testing.assert_close(head(x), logits.softmax(-1))
    torch.testing.assert_close(head.log_prob(x), logits.log_softmax(-1))
    torch.testing.assert_close(head.logits(x), logits)
    for options in ({}, {"reduction": "none"}, {"reduction": "sum", "label_smoothing": 0.2}, {"ignore_index": 2}):
        ignored = targets.clamp(min=0) if "ignore_index" in options else targets
        expected = F.cross_entropy(logits.transpose(1, 2), ignored, **options)
        torch.testing.assert_close(head.loss(x, ignored, **options), expected)
    assert head.loss(x[0, 0], targets[0, 0]).item() == pytest.approx(-math.log(head(x)[0, 0, 0].item()))
    with pytest.raises(ValueError, match=r"without the last dimension, \(2, 3\); got \(6,\)"):
        head.loss(x, targets.flatten())
