from __future__ import annotations

import pytest
import torch

from detr_fast import use_backend
from detr_fast.ops.attention import ATTENTION
from detr_fast.ops.attention_packed import run_packed, unpacked
from detr_fast.testing import count

pytestmark = pytest.mark.interpreter
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
SHARES = [(3,), (2, 1), (1, 2), (1, 1, 1)]


def implementation(name="triton"):
    with use_backend(attention=name):
        return ATTENTION.choose(*[torch.randn(2, 5, 1, 8)] * 3, None, None, False, 0.0, None)


def packs_of(shares, **options):
    return [torch.randn(2, 5, n, 1, 8, **options) for n in shares]


def attend(packs, mask=None, p=0.0, name="triton"):
    torch.manual_seed(4)
    return run_packed(implementation(name), packs, PADDING, mask, False, p)


def separately(packs, mask=None, p=0.0):
    torch.manual_seed(4)
    return implementation().run(*unpacked(packs), PADDING, mask, False, p, None)


LAYOUTS = {
    "packed": lambda t: t,
    "sequence first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "a layer's share of all": lambda t: torch.stack([t, t * 2], 3)[:, :, :, 0],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize(("shares", "layout"), list(zip(SHARES, LAYOUTS)), ids=str)
def test_gradients_of_packs_are_those_of_their_parts(shares, layout):
    packs = [LAYOUTS[layout](t).detach().requires_grad_() for t in packs_of(shares)]
    y, expected = attend(packs, p=0.3), separately(packs, p=0.3)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, packs, dy)
    for ours, theirs in zip(found, torch.autograd.grad(expected, packs, dy)):
        torch.testing.assert_close(ours, theirs)
    if layout in ("packed", "sequence first"):  # what follows reads them as the rows of one matrix
        assert [g.stride() for g in found] == [t.stride() for t in packs]


def test_nothing_is_put_together_after_the_kernels():
    packs = packs_of((3,), requires_grad=True)
    counts = count(lambda: attend(packs).sum().backward())
    assert counts.launches["aten.cat.default"] == counts.launches["aten.stack.default"] == 0
    assert counts.launches["attention_backward_keys_kernel"] == 1


def test_only_wanted_gradients_are_returned():
    q, kv = packs_of((1, 2))
    y = attend([q.requires_grad_(), kv])
    y.sum().backward()
    assert q.grad is not None
    assert kv.grad is None


def test_the_double_backward_drops_the_same_elements():
    packs = packs_of((1, 2), requires_grad=True)
    y = attend(packs, p=0.4)
    once = torch.autograd.grad(y.square().sum(), packs, retain_graph=True)
    again = torch.autograd.grad(y.square().sum(), packs, create_graph=True)  # recomputed eagerly
    torch.testing.assert_close(once, again, rtol=1e-3, atol=1e-3)
    torch.autograd.grad(again[1].square().sum(), packs)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_float_mask_that_needs_a_gradient_gets_it(create_graph):
    packs, mask = packs_of((3,), requires_grad=True), torch.randn(5, 5, requires_grad=True)
    y, expected = attend(packs, mask), separately(packs, mask)
    found = torch.autograd.grad(y.square().sum(), (*packs, mask), create_graph=create_graph)
    expected = torch.autograd.grad(expected.square().sum(), (*packs, mask))
    torch.testing.assert_close(found, expected)


def test_other_implementations_get_q_k_and_v():
    packs = packs_of((2, 1))
    torch.testing.assert_close(attend(packs, name="sdpa"), attend(packs), rtol=1e-4, atol=1e-5)


def test_opcheck_accepts_both_ops():
    packs = [torch.randn(1, 3, n, 1, 8, requires_grad=True) for n in (1, 2)]
    options = (False, 0.0, 0.3, 2, False, False)
    torch.library.opcheck(torch.ops.detr_fast.attention_packed.default, (packs, None, None, None, *options))
    with torch.no_grad():
        out, lse = torch.ops.detr_fast.attention_packed(packs, None, None, None, *options)
    mask = torch.randn(3, 3, requires_grad=True)
    for given in ((None, None, None, out, lse, False), (None, mask, None, out, lse, True)):
        arguments = (torch.randn_like(out), packs, *given, *options)
        torch.library.opcheck(torch.ops.detr_fast.attention_packed_backward.default, arguments)


@pytest.mark.parametrize("length", [0, 1])
def test_sequences_of_no_or_one_token_work(length):
    pack = torch.randn(2, length, 3, 2, 8, requires_grad=True)
    run_packed(implementation(), [pack], None, None, False, 0.0).sum().backward()
    assert pack.grad.shape == pack.shape
