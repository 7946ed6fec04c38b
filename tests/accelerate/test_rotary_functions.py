"""The functions by which transformers' attentions turn queries and keys, and what takes their place."""

from __future__ import annotations

import functools

import pytest
import torch

from detr_fast import dispatch, use_backend
from detr_fast.testing.interpreter import checked_interpreter

llama = pytest.importorskip("transformers.models.llama.modeling_llama")
rotary_functions = pytest.importorskip("detr_fast.adapters.rotary_functions")

# A function of each code that is known: where it is, its name, and how its arguments lie.
FUNCTIONS = {
    "llama": ("apply_rotary_pos_emb", "heads"),
    "olmo": ("apply_rotary_pos_emb", "heads"),
    "modernbert": ("apply_rotary_pos_emb", "heads"),
    "gpt_neox": ("apply_rotary_pos_emb", "heads"),
    "glmasr": ("apply_rotary_pos_emb", "heads"),
    "nemotron": ("apply_rotary_pos_emb", "heads"),
    "phi3": ("apply_rotary_pos_emb", "heads"),
    "gemma4": ("apply_rotary_pos_emb", "one"),
    "qwen2_vl": ("apply_rotary_pos_emb_vision", "packed"),
    "dinov3_vit": ("apply_rotary_pos_emb", "patches"),
    "sam3": ("apply_rotary_pos_emb_2d", "pixels"),
    "gpt_oss": ("apply_rotary_pos_emb", "heads"),
    "glm4v": ("apply_rotary_pos_emb", "heads"),
    "ernie4_5_vl_moe": ("apply_rotary_pos_emb", "heads"),
    "blt": ("apply_rotary_pos_emb", "heads"),
    "cohere": ("apply_rotary_pos_emb", "heads"),
    "glm": ("apply_rotary_pos_emb", "heads"),
    "ernie4_5": ("apply_rotary_pos_emb", "heads"),
    "deepseek_v3": ("apply_rotary_pos_emb_interleave", "heads"),
    "helium": ("apply_rotary_pos_emb", "heads"),
}
PARTIAL = ("gpt_neox", "glmasr", "nemotron", "phi3", "glm4v", "glm")


def arguments(where, kind, dtype, table):
    """Queries, keys (one at a time by "one"), cosines and sines, and what is given by name."""
    width = 8 if where in PARTIAL or where == "gpt_oss" else 16
    q, k = torch.randn(2, 3, 5, 16).to(dtype), torch.randn(2, 1, 5, 16).to(dtype)
    if kind == "packed":
        return [q[0].mT.reshape(5, 3, 16), k[0].mT.reshape(5, 1, 16), *torch.randn(2, 5, 16).to(table)], {}
    if kind == "patches":
        return [q, k, *torch.randn(2, 3, 16).to(table)], {}
    if kind == "pixels":
        cos, sin = torch.randn(2, 5, 16).to(table)
        return [q, k], {"cos": cos, "sin": sin}
    angles = torch.randn(2, 2, 5, width).to(table)
    return ([q] if kind == "one" else [q, k]) + [*angles], {}


@pytest.mark.interpreter
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", FUNCTIONS)
def test_what_takes_a_functions_place_computes_the_same(where, dtype, table):
    name, kind = FUNCTIONS[where]
    theirs = getattr(pytest.importorskip(f"transformers.models.{where}.modeling_{where}"), name)
    place = rotary_functions.place_of(theirs)
    torch.manual_seed(1)
    given, named = arguments(where, kind, dtype, table)
    found = []
    seen = dispatch.recording(lambda op, decision: found.append(decision.implementation.name))
    with checked_interpreter(), seen, use_backend(rotary_embedding="triton"):
        ours = place(*given, **named)
        if kind in ("heads", "one"):
            across = [t.transpose(1, 2) if t.ndim == 4 else t for t in given]
            turned = place(*across, unsqueeze_dim=2)
    assert found == ["triton"] * len(found)
    assert found
    expected = theirs(*given, **named)
    close = {"rtol": 2e-2, "atol": 6e-2} if torch.bfloat16 in (dtype, table) else {}
    torch.testing.assert_close(ours, expected, **close)
    if kind in ("heads", "one"):
        back = turned.transpose(1, 2) if kind == "one" else tuple(t.transpose(1, 2) for t in turned)
        torch.testing.assert_close(back, ours, rtol=0, atol=0)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q, k, cos[:, :1], sin[:, :1]),  # one place for all tokens
        lambda q, k, cos, sin: (q[0], k[0], cos, sin),
        lambda q, k, cos, sin: (q, k.bfloat16(), cos, sin),
        lambda q, k, cos, sin: (q.double(), k.double(), cos, sin),
        lambda q, k, cos, sin: (q[:1], k[:1], cos, sin),  # which become as many as the angles
    ],
)
def test_calls_that_no_kernel_takes_are_theirs(change):
    given = change(torch.randn(2, 3, 5, 16), torch.randn(2, 1, 5, 16), *torch.randn(2, 2, 5, 16))
    with use_backend("triton"):
        found = rotary_functions.place_of(llama.apply_rotary_pos_emb)(*given)
    expected = llama.apply_rotary_pos_emb(*given)
    assert all(map(torch.equal, found, expected))
    assert [t.dtype for t in found] == [t.dtype for t in expected]


def test_functions_that_turn_the_other_way_or_are_wrapped_are_not_known():
    nanochat = pytest.importorskip("transformers.models.nanochat.modeling_nanochat")
    assert rotary_functions.place_of(nanochat.apply_rotary_pos_emb) is None
    assert rotary_functions.place_of(functools.wraps(llama.apply_rotary_pos_emb)(lambda *given: given)) is None
    assert rotary_functions.place_of(llama.apply_rotary_pos_emb) is not None
