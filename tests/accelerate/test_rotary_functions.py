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
    "mistral_large4": ("apply_rotary_pos_emb_interleave", "heads"),
    "qwen4_exp": ("apply_rotary_pos_emb", "heads"),
    "nanochat": ("apply_rotary_pos_emb", "heads"),
    "pe_audio": ("apply_rotary_pos_emb", "heads"),
    "hunyuan_vl": ("apply_rotary_pos_emb", "heads"),
    "openai_privacy_filter": ("apply_rotary_pos_emb", "heads"),
    "deepseek_v4": ("apply_rotary_pos_emb", "one"),
    "inkling2": ("apply_rotary_pos_emb_vision", "packed"),
    "minimax_m3_vl": ("apply_rotary_pos_emb_vision", "packed"),
    "sam2_video": ("apply_rotary_pos_emb_2d", "pixels"),
    "deepseek_v2": ("apply_rotary_emb", "complex"),
    "llama4": ("apply_rotary_emb", "complex"),
    "llama4, patches": ("vision_apply_rotary_emb", "complex"),
}
PARTIAL = ("gpt_neox", "glmasr", "nemotron", "phi3", "glm4v", "glm", "qwen4_exp", "minimax_m3_vl", "deepseek_v4")
PER_PAIR = ("gpt_oss", "openai_privacy_filter")


def theirs_of(where):
    module = where.partition(",")[0]
    return getattr(pytest.importorskip(f"transformers.models.{module}.modeling_{module}"), FUNCTIONS[where][0])


def arguments(where, kind, dtype, table):
    """Queries, keys (one at a time by "one"), cosines and sines, and what is given by name."""
    width = 4 if where == "deepseek_v4" else 8 if where in (*PARTIAL, *PER_PAIR) else 16
    q, k = torch.randn(2, 3, 5, 16).to(dtype), torch.randn(2, 1, 5, 16).to(dtype)
    if kind == "packed":
        return [q[0].mT.reshape(5, 3, 16), k[0].mT.reshape(5, 1, 16), *torch.randn(2, 5, width).to(table)], {}
    if kind == "complex":
        turns = torch.polar(torch.rand(2, 5, 8) + 0.5, torch.randn(2, 5, 8))  # of any length
        if where == "deepseek_v2":
            return [q, k, turns], {}
        return [q.transpose(1, 2), k.transpose(1, 2), turns[0][:, None] if "patches" in where else turns], {}
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
    kind, theirs = FUNCTIONS[where][1], theirs_of(where)
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


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "where", ["llama4", "llama4, patches", "deepseek_v2", "deepseek_v4", "nanochat", "pe_audio", "minimax_m3_vl"]
)
def test_gradients_are_as_theirs(where):
    theirs, kind = theirs_of(where), FUNCTIONS[where][1]
    torch.manual_seed(1)
    given, _ = arguments(where, kind, torch.float32, torch.float32)
    learn = 1 if kind == "one" else 2
    results = []
    for function, backend in ((theirs, "eager"), (rotary_functions.place_of(theirs), "triton")):
        leaves = [t.clone().requires_grad_() for t in given[:learn]]
        with checked_interpreter(), use_backend(rotary_embedding=backend):
            found = function(*leaves, *given[learn:])
            found = [found] if kind == "one" else list(found)
            generator = torch.Generator().manual_seed(2)
            torch.autograd.backward(found, [torch.randn(y.shape, generator=generator) for y in found])
        results.append([t.grad for t in leaves])
    torch.testing.assert_close(*results)


@pytest.mark.interpreter
@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("times", [0, 1, 3])
def test_keys_of_sam_2s_memory_repeat_the_angles_and_those_of_no_place_stay(times, heads, others):
    theirs = theirs_of("sam2_video")
    torch.manual_seed(1)
    q, cos, sin = torch.randn(2, 5, heads, 16), *torch.randn(2, 5, 16)
    k = torch.randn(2, 5 * times + others, heads, 16)
    upstream = torch.randn_like(q), torch.randn_like(k)
    results = []
    for function, backend in ((theirs, "eager"), (rotary_functions.place_of(theirs), "triton")):
        given = [t.clone().requires_grad_() for t in (q, k)]
        with checked_interpreter(), use_backend(rotary_embedding=backend):
            found = function(
                *(t.transpose(1, 2) for t in given), cos, sin, repeat_freqs_k=times > 1, num_k_exclude_rope=others
            )
            torch.autograd.backward([t.transpose(1, 2) for t in found], upstream)
        results.append([*found, *(t.grad for t in given)])
    torch.testing.assert_close(*results)


@pytest.mark.interpreter
def test_qwen_4s_queries_are_turned_alone_and_without_keys_nothing_else_comes():
    theirs = theirs_of("qwen4_exp")
    q, cos, sin = torch.randn(2, 5, 3, 16), *torch.randn(2, 2, 5, 8)
    found = []
    seen = dispatch.recording(lambda op, decision: found.append(decision.implementation.name))
    with seen, use_backend(rotary_embedding="triton"):
        ours = rotary_functions.place_of(theirs)(q, cos=cos, sin=sin, unsqueeze_dim=2)
    assert found == ["triton"]
    torch.testing.assert_close(ours, theirs(q, cos=cos, sin=sin, unsqueeze_dim=2))


@pytest.mark.interpreter
@pytest.mark.parametrize("change", [torch.conj, lambda turns: turns.to(torch.complex128), lambda turns: turns[:, :1]])
def test_complex_numbers_that_no_kernel_takes_are_theirs(change):
    theirs = theirs_of("llama4")
    given = torch.randn(2, 5, 3, 16), torch.randn(2, 5, 1, 16), change(torch.randn(2, 5, 8, dtype=torch.complex64))
    with use_backend("triton"):
        found = rotary_functions.place_of(theirs)(*given)
    assert all(map(torch.equal, found, theirs(*given)))


def test_functions_that_are_wrapped_are_not_known():
    assert rotary_functions.place_of(functools.wraps(llama.apply_rotary_pos_emb)(lambda *given: given)) is None
    assert rotary_functions.place_of(llama.apply_rotary_pos_emb) is not None
