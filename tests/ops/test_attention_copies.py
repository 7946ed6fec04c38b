"""Head dimensions that are no whole number of 16 bytes, and tensors that start off them: copied first, then like any other."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast import ops
from detr_fast.dispatch import use_backend
from detr_fast.explanation import explaining
from detr_fast.ops.attention import ATTENTION
from detr_fast.ops.attention_eager import EagerAttention
from detr_fast.ops.attention_packed import run_packed, unpacked
from detr_fast.testing import assert_as_accurate_as_eager, counting
from tests.attention_inputs import end_padding, qkv, sequences
from tests.seen import nodes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
interpreter = pytest.mark.interpreter
COPY = "attention_copy_kernel"


@pytest.fixture(autouse=True)
def _triton():
    with use_backend(attention="triton", attention_varlen="triton"):
        yield


def off(tensor):
    """The same values, a step behind a multiple of 16 bytes."""
    return torch.cat([tensor[..., :1], tensor, tensor[..., :7]], -1)[..., 1 : 1 + tensor.shape[-1]]


# E, Ev: of one run or several, and none, one or most of the last left empty.
@interpreter
@pytest.mark.parametrize(
    ("dtype", "dims", "options"),
    [
        (FP16, (1, 1), {}),
        (BF16, (5, 33), {"is_causal": True, "scale": -0.4}),
        (FP16, (20, 20), {"key_padding_mask": end_padding()}),
        (FP32, (33, 5), {"attn_mask": torch.rand(5, 7) > 0.3}),
        (BF16, (100, 16), {"key_padding_mask": end_padding(), "is_causal": True}),
        (FP16, (16, 127), {"attn_mask": "float"}),
    ],
)
def test_any_head_dimension_is_as_accurate_as_eager(interpreter, dtype, dims, options):
    padding, causal, scale = (options.get(name) for name in ("key_padding_mask", "is_causal", "scale"))
    mask = torch.randn(5, 7) if options.get("attn_mask") == "float" else options.get("attn_mask")
    assert_as_accurate_as_eager(
        lambda q, k, v, mask: ops.attention(q, k, v, **{**options, "attn_mask": mask}),
        reference=lambda q, k, v, mask: EagerAttention().run(q, k, v, padding, mask, bool(causal), 0.0, scale),
        inputs=[*qkv(dim=dims[0], value_dim=dims[1]), mask],
        dtype=dtype,
    )
    assert interpreter.counts()[COPY] == 2


@interpreter
@pytest.mark.parametrize("backend", ["triton", "triton_atomics"])
@pytest.mark.parametrize("moved", [(True, True, True), (False, True, False)])
def test_what_starts_off_16_bytes_gives_what_else_it_gives_to_the_bit(interpreter, backend, moved):
    inputs = [t.half().requires_grad_() for t in qkv(heads=2)]
    dout = torch.randn(1, 5, 2, 8).half()
    found = []
    for arrange in (off, lambda t: t):
        q, k, v = (arrange(t) if move else t for t, move in zip(inputs, moved))
        with use_backend(attention=backend):
            y = ops.attention(q, k, v, key_padding_mask=end_padding())
        found.append((y, *torch.autograd.grad(y, inputs, arrange(dout))))
    assert interpreter.counts()[COPY] == 2
    assert all(map(torch.equal, *found))


@interpreter
@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (5, 1)])
def test_a_tile_starts_all_its_rows_at_16_bytes_where_but_one_is_there(interpreter, queries, keys):
    q, k, v = qkv(queries=queries, keys=keys)
    mask = torch.randn(queries, keys)
    expected = ops.attention(q, k, v, attn_mask=mask)
    q, k, v = (torch.cat([t, t[..., :1]], -1)[..., :8] if t.shape[1] == 1 else t for t in (q, k, v))
    assert torch.equal(ops.attention(q, k, v, attn_mask=torch.cat([mask, mask[:, :1]], -1)[:, :keys]), expected)
    assert interpreter.counts()[COPY] == 1


@interpreter
def test_dropout_is_the_twins_and_that_of_packs_and_weights():
    q, k, v = qkv(2, 20, 20, 2, 20, requires_grad=True)
    pack, dout = torch.stack([q, k, v], 2).detach().requires_grad_(), torch.randn(2, 20, 2, 20)
    results = []
    for backend in ("triton", "triton_atomics", "eager"):
        torch.manual_seed(11)
        with use_backend(attention=backend):
            out, weights = ops.attention_with_weights(q, k, v, dropout_p=0.3, average=False)
        results.append((out, weights, *torch.autograd.grad(out, (q, k, v), dout)))
    torch.manual_seed(11)
    implementation = ATTENTION.choose(q, k, v, None, None, False, 0.3, None)
    packed = run_packed(implementation, [pack], None, None, False, 0.3)
    (gradient,) = torch.autograd.grad(packed, pack, dout)
    assert gradient.shape == pack.shape
    results.append((packed, results[0][1], *unpacked([gradient])))
    for one in results[1:]:
        for ours, theirs in zip(results[0], one):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@interpreter
@pytest.mark.parametrize("backend", ["triton", "triton_atomics"])
def test_packed_sequences_have_any_head_dimension(backend):
    q, k, v, *rest = sequences((5, 1), (3, 7), surplus=3, dim=5, value_dim=9, dtype=FP32)
    found = []
    for name in (backend, "eager"):
        with use_backend(attention_varlen=name):
            y, lse = ops.attention_varlen(q, k, v, *rest, return_lse=True)
        found.append((y, lse, *torch.autograd.grad((y, lse[:1]), (q, k, v), (torch.ones_like(y), lse[:1].detach()))))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@interpreter
def test_one_launch_copies_all_that_a_pass_needs_and_the_call_keeps_what_it_was_given():
    inputs = qkv(dim=20, value_dim=12, dtype=FP16, requires_grad=True)
    with counting(tuple(inputs)) as forward:
        y = ops.attention(*inputs)
    dy = torch.ones_like(y)
    with counting() as backward:
        torch.autograd.grad(y, inputs, dy)
    assert forward.launches == {COPY: 1, "attention_forward_kernel": 1}
    assert backward.launches == {COPY: 1, "attention_backward_queries_kernel": 1, "attention_backward_keys_kernel": 1}
    assert y.stride(1) == 16
    assert forward.saved_bytes == 5 * 16 * 2 + 5 * 4  # the output, in whole runs, and the log-sum-exp


@interpreter
def test_tensors_in_whole_runs_are_never_copied(interpreter):
    q, k, v = qkv(dim=24, value_dim=8, dtype=FP16, heads=2, requires_grad=True)
    y = ops.attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
    torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
    assert COPY not in interpreter.counts()
    assert y.is_contiguous()


@interpreter
def test_the_double_backward_and_empty_sequences_take_any_head_dimension():
    for queries, keys in ((0, 3), (3, 0), (2, 3)):
        inputs = qkv(queries=queries, keys=keys, dim=5, requires_grad=True)
        found = []
        for backend in ("triton", "eager"):
            with use_backend(attention=backend):
                y = ops.attention(*inputs)
            first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
            found.append((y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)))
        for ours, theirs in zip(*found):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def opcheck(name, arguments):
    op = getattr(torch.ops.detr_fast, name).default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@interpreter
def test_opcheck_accepts_all_ops():
    q, k, v = qkv(dim=5, value_dim=3, requires_grad=True)
    pack, options = torch.stack([k, k, k], 2).detach().requires_grad_(), (False, 0.0, 0.3, 2, False, False)
    variable = sequences((2, 3), (4, 3), dim=5, value_dim=3, dtype=FP32)
    arguments = {
        "attention": (q, k, v, None, None, None, *options),
        "attention_packed": ([pack], None, None, None, *options),
        "attention_varlen": (*variable, None, None, *options),
    }
    for name, given in arguments.items():
        opcheck(name, given)
        with torch.no_grad():
            out, lse = getattr(torch.ops.detr_fast, name)(*given)
        dout = torch.randn_like(out)
        backward = {
            "attention": (dout, None, q, k, v, None, None, None, out, lse, False, *options),
            "attention_packed": (dout, [pack], None, None, None, out, lse, False, *options),
            "attention_varlen": (dout, None, out, lse, False, *given),
        }[name]
        opcheck(f"{name}_backward", backward)


@interpreter
def test_a_compiled_function_has_the_same_gradients():
    inputs = qkv(dim=5, requires_grad=True)

    def function(q, k, v):
        return ops.attention(q * 2, k, v).flatten(2).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (compiled, function))):
        torch.testing.assert_close(ours, theirs)


def test_fake_tensors_lie_as_real_ones():
    with FakeTensorMode():
        q, k, v = (t.transpose(0, 1) for t in qkv(7, 3, 7, heads=2, dim=20, device="cuda", dtype=BF16))
        assert ops.attention(q, k[:3], v[:3]).stride() == (64, 192, 32, 1)


@pytest.mark.parametrize(
    ("dim", "moved", "said"),
    [
        (20, False, "; copied to rows of whole 16 bytes: q, k, v"),
        (16, True, "; copied to rows of whole 16 bytes: q"),
        (16, False, ""),
    ],
)
def test_explain_says_what_is_copied(dim, moved, said):
    q, k, v = qkv(dim=dim, dtype=FP16, device="meta")
    for backend in ("triton", "triton_atomics"):
        with explaining() as records, use_backend(attention=backend):
            ops.attention(off(q) if moved else q, k.requires_grad_(), v)
        assert records[0].note.endswith(said)
        assert "copied" in records[0].note or not said


@pytest.mark.interpreter(None)
def test_calls_that_are_copied_are_repeated_from_cpp_to_the_bit(host):
    for _ in range(4):  # met, recorded, repeated, repeated on other tensors
        inputs = qkv(dim=5, requires_grad=True)
        found = []
        for _ in range(2):
            y = ops.attention(*inputs)
            found.append((y, *torch.autograd.grad(y, inputs, torch.ones_like(y))))
            assert all(map(torch.equal, found[0], found[-1]))
    expected = EagerAttention().run(*inputs, None, None, False, 0.0, None)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    assert "OpProgramBackward" in nodes(y)
