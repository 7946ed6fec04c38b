"""Odd and wrong inputs through ours and torch.nn's: the same class of outcome, whatever runs.

Either both raise the same type with a message, or both return equal values. What differs knowingly is not in the tables
but in test_differences.py and docs/differences.md.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn as torch_nn

from detr_fast import nn, use_backend
from detr_fast.explanation import explaining

INF = math.inf
BOOL = torch.bool


def x(*shape, dtype=torch.float64, **kwargs):
    return torch.randn(*(shape or (3, 4, 8)), dtype=dtype, **kwargs)


def visible(*shape):
    """A mask that hides nothing."""
    return torch.zeros(shape, dtype=BOOL)


def tail(*shape):
    """A mask that hides the last key."""
    mask = visible(*shape)
    mask[..., -1] = True
    return mask


def same(tensor, **kwargs):
    return (tensor, tensor, tensor), kwargs


NORM = {  # LayerNorm(8)
    "last dimension too short": lambda: ((x(2, 7),), {}),
    "last dimension too long": lambda: ((x(2, 9),), {}),
    "no dimension": lambda: ((torch.tensor(1.0, dtype=torch.float64),), {}),
    "no rows": lambda: ((x(0, 8),), {}),
    "float32 input": lambda: ((x(2, 8, dtype=torch.float32),), {}),
    "integer input": lambda: ((torch.ones(2, 8, dtype=torch.int64),), {}),
    "complex input": lambda: ((x(2, 8, dtype=torch.complex128),), {}),
    "bool input": lambda: ((torch.ones(2, 8, dtype=BOOL),), {}),
    "meta input": lambda: ((x(2, 8, device="meta"),), {}),
    "a list": lambda: (([[1.0] * 8],), {}),
    "a string": lambda: (("text",), {}),
    "None": lambda: ((None,), {}),
    "nothing": lambda: ((), {}),
    "an unknown keyword": lambda: ((x(2, 8),), {"scale": 2}),
    "expanded input": lambda: ((x(1, 8).expand(5, 8),), {}),
    "transposed input": lambda: ((x(8, 5).t(),), {}),
    "every other element": lambda: ((x(5, 16)[:, ::2],), {}),
    "six dimensions": lambda: ((x(1, 2, 1, 2, 1, 8),), {}),
    "infinite values": lambda: ((torch.full((2, 8), INF, dtype=torch.float64),), {}),
    "NaN in one row": lambda: ((x(3, 8).index_fill(0, torch.tensor([1]), math.nan),), {}),
    "constant rows": lambda: ((torch.full((2, 8), 3.0, dtype=torch.float64),), {}),
    "sparse input": lambda: ((x(2, 8).to_sparse(),), {}),
}

ATTENTION = {  # MultiheadAttention(8, 2, batch_first=True)
    "wrong width": lambda: same(x(3, 4, 7)),
    "wrong width of keys": lambda: ((x(), x(3, 4, 7), x()), {}),
    "wrong width of values": lambda: ((x(), x(), x(3, 4, 7)), {}),
    "one dimension": lambda: same(x(8)),
    "four dimensions": lambda: same(x(2, 3, 4, 8)),
    "no dimension": lambda: same(torch.tensor(1.0, dtype=torch.float64)),
    "unbatched query, batched keys": lambda: ((x(4, 8), x(), x()), {}),
    "batched query, unbatched keys": lambda: ((x(), x(4, 8), x(4, 8)), {}),
    "another batch of keys": lambda: ((x(), x(2, 4, 8), x(2, 4, 8)), {}),
    "one key batch for all": lambda: ((x(), x(1, 4, 8), x(1, 4, 8)), {}),
    "fewer values than keys": lambda: ((x(), x(3, 5, 8), x(3, 4, 8)), {}),
    "no queries": lambda: ((x(3, 0, 8), x(), x()), {}),
    "no batch": lambda: same(x(0, 4, 8)),
    "one query, one key": lambda: same(x(1, 1, 8)),
    "float32 input": lambda: same(x(dtype=torch.float32)),
    "float32 keys": lambda: ((x(), x(dtype=torch.float32), x(dtype=torch.float32)), {}),
    "integer input": lambda: same(torch.ones(3, 4, 8, dtype=torch.int64)),
    "complex input": lambda: same(x(dtype=torch.complex128)),
    "None for keys": lambda: ((x(), None, x()), {}),
    "a list": lambda: same([[1.0] * 8]),
    "a missing value": lambda: ((x(), x()), {}),
    "an unknown keyword": lambda: same(x(), mask=None),
    "expanded input": lambda: same(x(1, 4, 8).expand(3, 4, 8)),
    "transposed input": lambda: same(x(3, 8, 4).transpose(1, 2)),
    "every other element": lambda: same(x(3, 4, 16)[..., ::2]),
    "integer padding": lambda: same(x(), key_padding_mask=torch.zeros(3, 4, dtype=torch.int64)),
    "uint8 padding": lambda: same(x(), key_padding_mask=torch.zeros(3, 4, dtype=torch.uint8)),
    "padding of another batch": lambda: same(x(), key_padding_mask=visible(2, 4)),
    "padding of another length": lambda: same(x(), key_padding_mask=visible(3, 5)),
    "transposed padding": lambda: same(x(), key_padding_mask=visible(4, 3)),
    "one-dimensional padding": lambda: same(x(), key_padding_mask=visible(4)),
    "three-dimensional padding": lambda: same(x(), key_padding_mask=visible(3, 1, 4)),
    "two-dimensional padding, unbatched": lambda: same(x(4, 8), key_padding_mask=visible(1, 4)),
    "expanded padding": lambda: same(x(), key_padding_mask=tail(1, 4).expand(3, 4)),
    "float32 padding": lambda: same(x(), key_padding_mask=torch.randn(3, 4)),
    "float16 padding": lambda: same(x(), key_padding_mask=torch.randn(3, 4).half()),
    "float32 padding without weights": lambda: same(x(), key_padding_mask=torch.randn(3, 4), need_weights=False),
    "float16 mask without weights": lambda: same(x(), attn_mask=torch.randn(4, 4).half(), need_weights=False),
    "padding as a list": lambda: same(x(), key_padding_mask=[[False] * 4] * 3),
    "integer mask": lambda: same(x(), attn_mask=torch.zeros(4, 4, dtype=torch.int64)),
    "mask of another length": lambda: same(x(), attn_mask=visible(4, 5)),
    "mask of another batch": lambda: same(x(), attn_mask=visible(3, 4, 4)),
    "mask for one head": lambda: same(x(), attn_mask=visible(1, 4, 4)),
    "four-dimensional mask": lambda: same(x(), attn_mask=visible(3, 2, 4, 4)),
    "one-dimensional mask": lambda: same(x(), attn_mask=visible(4)),
    "three-dimensional mask, unbatched": lambda: same(x(4, 8), attn_mask=tail(2, 4, 4)),
    "mask of another number of heads, unbatched": lambda: same(x(4, 8), attn_mask=tail(3, 4, 4)),
    "expanded mask": lambda: same(x(), attn_mask=tail(4).expand(4, 4)),
    "float16 mask": lambda: same(x(), attn_mask=torch.randn(4, 4).half()),
    "mask of +inf": lambda: same(x(), attn_mask=torch.full((4, 4), INF, dtype=torch.float64)),
    "mask with NaN": lambda: same(x(), attn_mask=torch.full((4, 4), math.nan, dtype=torch.float64)),
    "bool padding and float mask": lambda: same(x(), key_padding_mask=tail(3, 4), attn_mask=x(4, 4)),
    "float padding and bool mask": lambda: same(x(), key_padding_mask=x(3, 4), attn_mask=tail(4, 4)),
    "causal without a mask": lambda: same(x(), is_causal=True),
    "causal without a mask or weights": lambda: same(x(), is_causal=True, need_weights=False),
    "causal over more keys": lambda: (
        (x(), x(3, 6, 8), x(3, 6, 8)),
        {"attn_mask": torch.ones(4, 6, dtype=BOOL).triu(1), "is_causal": True, "need_weights": False},
    ),
    "infinite query": lambda: ((torch.full((3, 4, 8), INF, dtype=torch.float64), x(), x()), {}),
    "NaN in one key": lambda: ((x(), x().index_fill(1, torch.tensor([2]), math.nan), x()), {}),
    "NaN in a hidden value": lambda: (
        (x(), x(), x().index_fill(1, torch.tensor([3]), math.nan)),
        {"key_padding_mask": tail(3, 4)},
    ),
    "huge scores": lambda: ((1e150 * x(), x(), x()), {}),
    "sparse query": lambda: ((x().to_sparse(), x(), x()), {}),
    "meta input": lambda: same(x(3, 4, 8, device="meta")),
    "meta keys": lambda: ((x(), x(3, 4, 8, device="meta"), x(3, 4, 8, device="meta")), {}),
    "bfloat16 input": lambda: same(x(dtype=torch.bfloat16)),
    "padding and mask that leave one key": lambda: same(
        x(), key_padding_mask=tail(3, 4), attn_mask=torch.tensor([True, True, False, False]).expand(4, 4)
    ),
    "an overlapping view": lambda: same(x(40).as_strided((3, 4, 8), (8, 4, 1))),
    "text for need_weights": lambda: same(x(), need_weights="yes"),
    "a number for a mask": lambda: same(x(), attn_mask=0.0),
}

TRANSFORMER = {  # Transformer(8, 2, 1, 1, 12, 0.0, batch_first=True)
    "wrong width": lambda: ((x(3, 4, 7), x(3, 4, 7)), {}),
    "another batch": lambda: ((x(), x(2, 4, 8)), {}),
    "unbatched": lambda: ((x(5, 8), x(4, 8)), {}),
    "unbatched source only": lambda: ((x(4, 8), x()), {}),
    "no target tokens": lambda: ((x(), x(3, 0, 8)), {}),
    "integer source mask": lambda: ((x(), x()), {"src_mask": torch.zeros(4, 4, dtype=torch.int64)}),
    "integer source padding": lambda: ((x(), x()), {"src_key_padding_mask": torch.zeros(3, 4, dtype=torch.int64)}),
    "target mask of another length": lambda: ((x(), x()), {"tgt_mask": visible(5, 5)}),
    "memory padding of another length": lambda: ((x(), x(3, 5, 8)), {"memory_key_padding_mask": visible(3, 5)}),
    "bool padding and float mask": lambda: ((x(), x()), {"src_key_padding_mask": tail(3, 4), "src_mask": x(4, 4)}),
    "float32 source": lambda: ((x(dtype=torch.float32), x()), {}),
    "one argument": lambda: ((x(),), {}),
}

CONSTRUCTORS = {
    "heads that do not divide the width": ("MultiheadAttention", (8, 3), {}),
    "no heads": ("MultiheadAttention", (8, 0), {}),
    "negative width": ("MultiheadAttention", (-8, 2), {}),
    "width 0": ("MultiheadAttention", (0, 2), {}),
    "text for a width": ("MultiheadAttention", ("8", 2), {}),
    "an unknown dtype": ("MultiheadAttention", (8, 2), {"dtype": "float32"}),
    "an integer dtype": ("LayerNorm", (8,), {"dtype": torch.int64}),
    "a negative normalized_shape": ("LayerNorm", (-8,), {}),
    "a fractional normalized_shape": ("LayerNorm", (8.5,), {}),
    "an unknown activation": ("TransformerEncoderLayer", (8, 2), {"activation": "sigmoidal"}),
    "dropout over 1": ("TransformerEncoderLayer", (8, 2), {"dropout": 1.5}),
    "negative dropout": ("TransformerDecoderLayer", (8, 2), {"dropout": -0.1}),
    "a layer that is a number": ("TransformerEncoder", (3, 2), {}),
    "an unknown keyword": ("Transformer", (8, 2), {"layers": 2}),
    "heads that do not divide": ("Transformer", (8, 3), {}),
}


def test_the_tables_are_long_enough():
    assert len(NORM) + len(ATTENTION) + len(TRANSFORMER) + len(CONSTRUCTORS) >= 60


def outcome(call):
    """The values of a call, or the type of what it raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = call()
    except Exception as error:
        return type(error) if str(error) else f"{type(error).__name__} without a message"
    return output if isinstance(output, torch.Tensor) else output[0]


def assert_same_outcome(found, expected, tolerance=1e-9):
    if isinstance(expected, (type, str)) or isinstance(found, (type, str)):
        assert found == expected
    elif expected.is_meta:
        assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    else:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def compare(ours, original, table, case, backend):
    arguments, keywords = table[case]()
    expected = outcome(lambda: original(*arguments, **keywords))
    with use_backend(**backend):
        assert_same_outcome(outcome(lambda: ours(*arguments, **keywords)), expected)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("backend", [{}, {"layer_norm": "eager", "rms_norm": "eager"}], ids=str)
@pytest.mark.parametrize("case", NORM)
def test_norms(case, backend, name, twins):
    compare(*twins(name, 8), NORM, case, backend)


@pytest.mark.parametrize("backend", [{}, {"attention": "sdpa"}, {"attention": "eager"}], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case, training, backend, twins):
    ours, original = (m.train(training) for m in twins("MultiheadAttention", 8, 2, batch_first=True))
    compare(ours, original, ATTENTION, case, backend)


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_while_it_is_explained(case, twins):
    ours, original = twins("MultiheadAttention", 8, 2, batch_first=True)
    with explaining(ours):
        compare(ours, original, ATTENTION, case, {})


# A known difference; and infinite scores, of which torch.nn makes what the path that it takes makes of them.
NOT_ON_THE_KERNEL = {"NaN in a hidden value", "infinite query", "huge scores"}


@pytest.mark.interpreter
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", [case for case in ATTENTION if case not in NOT_ON_THE_KERNEL])
def test_attention_on_the_kernel(case, need_weights, twins):
    ours, original = twins("MultiheadAttention", 8, 2, batch_first=True, dtype=torch.float32)
    arguments, keywords = ATTENTION[case]()
    singles = {id(t): t.float() for t in (*arguments, *keywords.values()) if getattr(t, "dtype", None) == torch.float64}
    arguments = [singles.get(id(value), value) for value in arguments]  # the same tensor stays the same
    keywords = {"need_weights": need_weights} | {
        name: singles.get(id(value), value) for name, value in keywords.items()
    }
    expected = outcome(lambda: original(*arguments, **keywords))
    with use_backend(attention="triton"):
        found = outcome(lambda: ours(*arguments, **keywords))
    assert_same_outcome(found, expected, tolerance=1e-4)


@pytest.mark.parametrize("backend", [{}, {"attention": "sdpa"}, {"attention": "eager"}], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", TRANSFORMER)
def test_transformer(case, training, backend, twins):
    ours, original = (m.train(training) for m in twins("Transformer", 8, 2, 1, 1, 12, 0.0, batch_first=True))
    compare(ours, original, TRANSFORMER, case, backend)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("backend", [{}, {"attention": "sdpa"}, {"attention": "eager"}], ids=str)
def test_decoder_layers_that_share_a_memory_of_no_images(backend, batch_first, assert_same_step, twins):
    ours, original = twins("Transformer", 8, 2, 1, 2, 12, 0.0, batch_first=batch_first)
    inputs = [x(0, 4, 8), x(0, 5, 8)] if batch_first else [x(4, 0, 8), x(5, 0, 8)]
    assert_same_step(ours, original, inputs, rtol=1e-9, backend=backend)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dropout", [1.0, 1.5, -0.5])
@pytest.mark.parametrize("backend", [{}, {"attention": "sdpa"}, {"attention": "eager"}], ids=str)
def test_extreme_dropout(backend, dropout, need_weights, twins):
    ours, original = twins("MultiheadAttention", 8, 2, dropout=dropout)
    table = {"": lambda: same(x(), need_weights=need_weights)}
    compare(ours, original, table, "", backend)


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_constructors(case):
    name, arguments, keywords = CONSTRUCTORS[case]
    results = []
    for source in (nn, torch_nn):
        try:
            results.append(repr(getattr(source, name)(*arguments, **keywords)))
        except Exception as error:
            results.append((type(error), str(error).replace("detr_fast.nn", "torch.nn")))
    assert results[0] == results[1]
