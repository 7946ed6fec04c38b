from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from benchmarks.hardware import DEVICE
from detr_fast import ops
from detr_fast.dispatch import use_backend

B, H, L, S, E = 2, 3, 5, 7, 8


def qkv(queries=L, keys=S):
    return (torch.randn(B, n, H, E, requires_grad=True) for n in (queries, keys, keys))


def masks(padding, mask, queries=L, keys=S):
    key_padding = torch.zeros(B, keys, dtype=torch.bool)
    key_padding[0, keys // 2 + 1 :] = True
    attn = {
        None: None,
        "bool": torch.rand(queries, keys) > 0.3,
        "float": torch.randn(B, 1, queries, keys),
    }[mask]
    if mask == "bool":
        attn[:, 0] = True
    return (key_padding if padding else None), attn


def by_definition(q, k, v, padding, mask, causal):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * E**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("padding", "mask", "causal"), list(itertools.product([False, True], [None, "bool", "float"], [False, True]))
)
def test_every_combination_of_masks_equals_the_definition(implementation, padding, mask, causal):
    q, k, v = qkv()
    key_padding, attn = masks(padding, mask)
    expected = by_definition(q, k, v, key_padding, attn, causal)
    with use_backend(attention=implementation):
        out = ops.attention(q, k, v, key_padding_mask=key_padding, attn_mask=attn, is_causal=causal)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("sdpa", torch.bool),
        ("sdpa", torch.float32),
        ("eager", torch.float32),
        pytest.param("triton", torch.float32, marks=pytest.mark.interpreter),
        pytest.param("triton_atomics", torch.bool, marks=pytest.mark.interpreter),
    ],
)
def test_masks_that_come_again_after_some_batch_elements_equal_repeated_ones(implementation, dtype):
    """With the weights, dropout and the mask's own gradient and second one where they have one."""
    q, k, v = (torch.randn(4, n, 1, E, requires_grad=True) for n in (L, S, S))
    mask = torch.randn(1, 2, 1, L, S)
    mask = mask > -1 if dtype == torch.bool else mask.requires_grad_()
    leaves, found = [t for t in (q, k, v, mask) if t.requires_grad], []
    for one in (mask, mask[0].repeat(2, 1, 1, 1)):
        torch.manual_seed(5)
        with use_backend(attention=implementation):
            out = ops.attention(q, k, v, attn_mask=one, dropout_p=0.3)
            shown, weights = ops.attention_with_weights(q, k, v, attn_mask=one)
            loss = out.square().sum() + shown.sum() + weights.square().sum()
            gradients = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
        found.append((out, weights, *gradients, *second))
    for ours, truth in zip(*found):
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_masks_that_come_again_may_do_so_in_no_batch_element(implementation):
    q, k, v = (torch.randn(0, n, 1, E, requires_grad=True) for n in (L, S, S))
    mask = torch.randn(1, 2, 1, L, S, requires_grad=True)
    with use_backend(attention=implementation):
        out = ops.attention(q, k, v, attn_mask=mask)
    assert out.shape == q.shape
    assert torch.equal(*torch.autograd.grad(out.sum(), [mask]), torch.zeros_like(mask))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_without_a_visible_key_give_zeros_and_zero_gradients(implementation):
    q, k, v = qkv()
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1] = True
    with use_backend(attention=implementation):
        out = ops.attention(q, k, v, key_padding_mask=padding)
    out.sum().backward()
    assert not out[1].any()
    assert not any(t.grad[1].any() for t in (q, k, v))
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("keys", [7, 8])
@pytest.mark.parametrize("autocast", [False, True])
def test_sdpa_gets_padding_as_what_it_would_make_of_a_bool_mask_in_rows_that_no_kernel_copies(
    keys, autocast, monkeypatch
):
    given, original = [], F.scaled_dot_product_attention
    spy = lambda *a, **options: given.append(a) or original(*a, **options)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    tensors = [t.bfloat16() if autocast else t for t in qkv(keys=keys)]
    padding, _ = masks(True, None, keys=keys)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = ops.attention(*tensors, key_padding_mask=padding)
        expected = original(*(t.transpose(1, 2) for t in tensors), ~padding[:, None, None]).transpose(1, 2)
    (bias,) = (arguments[3] for arguments in given)
    assert torch.equal(out, expected)
    assert bias.dtype == out.dtype
    assert bias.shape == (B, 1, 1, keys)
    assert bias.stride(0) == 8
    assert torch.equal(bias[:, 0, 0] == -torch.inf, padding)


def test_a_padding_mask_that_changes_in_place_is_read_anew():
    q, k, v = qkv()
    padding, _ = masks(True, None)
    before = ops.attention(q, k, v, key_padding_mask=padding)
    padding[1, 2:] = True
    after = ops.attention(q, k, v, key_padding_mask=padding)
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(after, by_definition(q, k, v, padding, None, False))


@pytest.mark.gpu
def test_a_graph_reads_the_padding_of_each_replay():
    q, k, v = (torch.randn(B, n, H, E, device=DEVICE, dtype=torch.float16) for n in (L, S, S))
    padding = torch.zeros(B, S, dtype=torch.bool, device=DEVICE)
    with use_backend(attention="sdpa"):
        ops.attention(q, k, v, key_padding_mask=padding)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.attention(q, k, v, key_padding_mask=padding)
        for hidden in (5, 3):
            padding[:, hidden:] = True
            graph.replay()
            expected = by_definition(*(t.float() for t in (q, k, v)), padding, None, False)
            torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=1e-2)


def test_padding_may_be_mapped_over():
    q, k, v = (t.detach() for t in qkv())
    paddings = torch.stack([masks(True, None)[0], torch.zeros(B, S, dtype=torch.bool)])
    mapped = torch.vmap(lambda padding: ops.attention(q, k, v, key_padding_mask=padding))(paddings)
    expected = torch.stack([by_definition(q, k, v, padding, None, False) for padding in paddings])
    torch.testing.assert_close(mapped, expected)


def test_nan_in_padded_keys_never_leaks_from_the_weights():
    q, k, v = qkv()
    padding, _ = masks(True, None)
    _, weights = ops.attention_with_weights(q, k, v, key_padding_mask=padding)
    assert not weights[0, :, :, S // 2 + 1 :].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, L))


def test_scaled_dot_product_attention_is_torchs():
    q, k, v = (t.transpose(1, 2) for t in qkv())
    mask = torch.rand(L, S) > 0.2
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    torch.testing.assert_close(ops.scaled_dot_product_attention(q, k, v, mask, scale=0.3), expected)
    with use_backend(attention="eager"):
        torch.testing.assert_close(ops.scaled_dot_product_attention(q, k, v, mask, scale=0.3), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (1, 1), (3, 0)])
def test_empty_and_single_sequences_work(implementation, queries, keys):
    q, k, v = qkv(queries, keys)
    with use_backend(attention=implementation):
        out = ops.attention(q, k, v)
    assert out.shape == (B, queries, H, E)
    assert keys or not out.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(2, 5, 8)}, r"takes q \(B, L, H, E\).*got \(2, 5, 8\)"),
        ({"k": torch.randn(2, 7, 4, 8)}, r"k must be \(B, S, H, E\)"),
        ({"key_padding_mask": torch.zeros(2, 6, dtype=torch.bool)}, r"\(B, S\) = \(2, 7\).*got torch.bool \(2, 6\)"),
        ({"key_padding_mask": torch.zeros(2, 7)}, "must be bool"),
        ({"attn_mask": torch.zeros(4, 7)}, r"broadcast to \(B, H, L, S\) = \(2, 3, 5, 7\)"),
        ({"attn_mask": torch.zeros(5, 7, dtype=torch.int64)}, "bool .* or float"),
        ({"attn_mask": torch.zeros(1, 4, 3, 5, 7)}, r"broadcast to \(B, H, L, S\) = \(2, 3, 5, 7\)"),
        ({"attn_mask": torch.zeros(2, 1, 3, 5, 7)}, r"got torch.float32 \(2, 1, 3, 5, 7\)"),
        ({"dropout_p": 1.5}, r"lie in \[0, 1\]; got 1.5"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_shapes(change, message):
    arguments = dict(zip("qkv", qkv())) | change
    with pytest.raises(ValueError, match=message):
        ops.attention(**arguments)


def test_a_compiled_call_has_no_graph_break():
    q, k, v = qkv()
    compiled = torch.compile(
        lambda q, k, v: ops.attention(q, k, v, is_causal=True), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q, k, v), ops.attention(q, k, v, is_causal=True))
