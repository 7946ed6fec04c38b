"""Single ops that are called again, in C++: what Python's path gives, to the bit, and Python wherever somebody looks."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from detr_fast.kernels import launch
from torch.utils.checkpoint import checkpoint

from benchmarks.test_host_time import CASES, DIM, HEADS, LENGTH, ROWS, WIDTH
from detr_fast import nn, ops, use_backend
from detr_fast.ops import host_native, host_program
from detr_fast.ops.dropout import shared_seed
from detr_fast.ops.layer_norm import LAYER_NORM
from detr_fast.ops.layer_norm_autograd import forward
from detr_fast.testing.quick_interpreter import quick_interpreter
from tests.seen import Seen, nodes

pytestmark = pytest.mark.interpreter(None)
PROGRAM = "OpProgramBackward"


@pytest.fixture(autouse=True)
def _triton(host):
    host_native.unrepeatable.clear()
    with use_backend("triton"), quick_interpreter():
        yield


def leaves_of(shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def step(function, leaves, seed=3):
    torch.manual_seed(seed)
    y = function(*leaves)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def in_python(run):
    """What `run` gives where somebody is told of launches, which C++ would leave out."""
    told = []
    launch.observers.append(told.append)
    try:
        found = run()
    finally:
        launch.observers.remove(told.append)
    assert told
    return found


def layer_norm(x, weight, bias):
    return ops.layer_norm(x, (WIDTH,), weight, bias)


NORM = [(ROWS, WIDTH), (WIDTH,), (WIDTH,)]


def test_a_call_that_met_too_little_memory_is_asked_for_again_some_calls_later(monkeypatch):
    free, asked = 0, []
    monkeypatch.setattr(host_native, "SMALL", 0)
    monkeypatch.setattr(host_native, "LATER", 5)
    monkeypatch.setattr(host_native, "_free", lambda device: asked.append(free) or free)
    leaves = leaves_of(NORM)
    made = []
    for call in range(16):
        free = (1 << 40) * (call >= 8)
        made.append(PROGRAM in nodes(layer_norm(*leaves)))
    # The first call is not asked about, the second finds no memory, nor does the one after five more; the next one does.
    assert asked == [0, 0, 1 << 40]
    assert made == [False] * 13 + [True] * 3


def known(shapes=NORM, function=layer_norm):
    """Leaves of a call that there is a program of."""
    leaves = leaves_of(shapes)
    for _ in range(2):
        step(function, leaves)
    assert PROGRAM in nodes(function(*leaves)), host_native.unrepeatable
    return leaves


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_an_op_called_again_gives_what_python_gives_to_the_bit(name, autocast):
    function, _, shapes = CASES[name]
    function = torch.autocast("cpu", torch.bfloat16, enabled=autocast)(function)
    for _ in range(4):  # met, recorded, repeated, repeated on other tensors
        leaves = leaves_of(shapes)
        found = step(function, leaves)
        expected = in_python(lambda leaves=leaves: step(function, leaves))
        assert all(map(torch.equal, found, expected))
    assert PROGRAM in nodes(function(*leaves)), host_native.unrepeatable


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True), (True, True, False)])
def test_only_gradients_that_are_wanted_come(wanted):
    leaves = leaves_of(NORM)
    for leaf, want in zip(leaves, wanted):
        leaf.requires_grad_(want)
    sources = [leaf for leaf in leaves if leaf.requires_grad]
    dy = torch.randn(ROWS, WIDTH)
    for _ in range(3):
        y = layer_norm(*leaves)
        found = torch.autograd.grad(y, sources, dy)
        expected = in_python(lambda: torch.autograd.grad(layer_norm(*leaves), sources, dy))
        assert all(map(torch.equal, found, expected))
    assert PROGRAM in nodes(y)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_no_node_and_inference_mode_has_its_own_tensors(mode):
    leaves = known()
    with mode():
        for _ in range(3):
            y = layer_norm(*leaves)
            assert y.grad_fn is None
            assert y.is_inference() is (mode is torch.inference_mode)
    assert layer_norm(*leaves).requires_grad


def test_each_call_draws_its_own_dropout_and_the_backward_that_calls():
    def twice(x, residual, weight, bias):
        with shared_seed():  # the second of them has another offset
            y = ops.add_layer_norm(x, residual, weight, bias, dropout_p=0.5)
            return torch.cat([y, ops.add_layer_norm(x, residual, weight, bias, dropout_p=0.5)])

    leaves = leaves_of([(ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,), (WIDTH,)])
    for seed in range(4):
        found = step(twice, leaves, seed)
        expected = in_python(lambda seed=seed: step(twice, leaves, seed))
        assert all(map(torch.equal, found, expected))
        one, other = found[0].chunk(2)
        assert not torch.equal(one, other)
    assert PROGRAM in nodes(twice(*leaves))


def test_packed_projections_and_one_tensor_given_twice_are_told_apart():
    def attention(q, k, v):
        return ops.attention(q, k, v)

    pack = torch.randn(1, LENGTH, 3, HEADS, DIM, requires_grad=True)
    other = torch.randn(1, LENGTH, 3, HEADS, DIM, requires_grad=True)
    dy = torch.randn(1, LENGTH, HEADS, DIM)
    calls = [
        # First the one whose program knows two tensors by one address: no other may take it.
        lambda: attention(pack[:, :, 0], pack[:, :, 0], other[:, :, 2]),
        lambda: attention(pack[:, :, 0], other[:, :, 1], pack[:, :, 2]),  # the same shapes and layouts
        lambda: attention(*pack.unbind(2)),
        lambda: attention(*pack.unbind(2)[::-1]),
    ]
    for _ in range(3):
        for call in calls:
            found = torch.autograd.grad(call(), (pack, other), dy, allow_unused=True)
            expected = in_python(lambda call=call: torch.autograd.grad(call(), (pack, other), dy, allow_unused=True))
            for one, right in zip(found, expected):
                assert (one is None and right is None) or torch.equal(one, right)
    assert all(PROGRAM in nodes(call()) for call in calls), host_native.unrepeatable


@pytest.mark.parametrize("trained", [(True, True, True), (False, True, True), (True, False, False)])
def test_ops_of_lists_of_tensors_are_repeated_too(trained):
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    inputs = [torch.randn(1, 3, 8, requires_grad=want) for want in trained]
    sources = [t for t in inputs if t.requires_grad]
    dy = torch.randn(1, 3, 8)

    def step(create_graph=False):
        torch.manual_seed(3)
        y = attention(*inputs, need_weights=False)[0]
        return [y, *torch.autograd.grad(y, sources, dy, create_graph=create_graph)]

    for create_graph in (False, False, False, True):
        assert all(map(torch.equal, step(create_graph), in_python(lambda again=create_graph: step(again))))
    assert PROGRAM in nodes(step()[0]), host_native.unrepeatable


def test_a_gradient_in_another_layout_is_read_as_it_lies():
    leaves = known()
    for dy in (torch.ones(1).expand(ROWS, WIDTH), torch.randn(WIDTH, ROWS).t(), torch.randn(ROWS + 1, WIDTH)[1:]):
        found = torch.autograd.grad(layer_norm(*leaves), leaves, dy)
        expected = in_python(lambda dy=dy: torch.autograd.grad(layer_norm(*leaves), leaves, dy))
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", [name for name in CASES if name != "attention_varlen"])
def test_the_double_backward_is_the_nodes_own(name):
    function, _, shapes = CASES[name]
    leaves = known(shapes, function)

    def twice():
        torch.manual_seed(5)
        y = function(*leaves)
        dy = torch.linspace(-1, 1, y.numel()).view_as(y).requires_grad_()
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        total = sum(g.sin().sum() for g in first)
        return [*first, *torch.autograd.grad(total, [dy, *leaves], allow_unused=True)]

    for found, expected in zip(twice(), in_python(twice)):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_sum_that_is_returned_has_its_own_gradient():
    def both(x, residual, weight, bias):
        return ops.add_layer_norm(x, residual, weight, bias, return_sum=True)

    leaves = leaves_of([(ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,), (WIDTH,)])
    dys = torch.randn(2, ROWS, WIDTH)

    def gradients(*arriving):
        return torch.autograd.grad(
            [y for y, dy in zip(both(*leaves), arriving) if dy is not None],
            leaves,
            [dy for dy in arriving if dy is not None],
            allow_unused=True,
        )

    for _ in range(3):
        for arriving in ((dys[0], dys[1]), (dys[0], None), (None, dys[1])):
            expected = in_python(lambda arriving=arriving: gradients(*arriving))
            for found, right in zip(gradients(*arriving), expected):
                assert (found is None and right is None) or torch.equal(found, right)
    assert PROGRAM in nodes(both(*leaves)[0])


def test_a_mode_sees_the_ops_also_where_it_is_entered_before_the_backward_alone():
    leaves = known()
    loss = layer_norm(*leaves).sum()
    with Seen() as seen:
        torch.autograd.grad(loss, leaves)
    assert "detr_fast::layer_norm_backward" in seen.names
    with Seen() as seen:
        layer_norm(*leaves)
    assert "detr_fast::layer_norm" in seen.names


def test_a_profiler_sees_the_ops():
    leaves = known()
    with torch.profiler.profile() as profile:
        layer_norm(*leaves).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"detr_fast::layer_norm", "detr_fast::layer_norm_backward"} <= names


def test_hooks_on_what_is_saved_see_it_and_checkpointing_recomputes():
    leaves = known()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        layer_norm(*leaves)
    assert packed
    found = torch.autograd.grad(checkpoint(layer_norm, *leaves, use_reentrant=False).sum(), leaves)
    assert all(map(torch.equal, found, torch.autograd.grad(layer_norm(*leaves).sum(), leaves)))


@pytest.mark.skipif(not hasattr(torch.autograd.graph, "node_creation_hook"), reason="newer than torch 2.11")
def test_hooks_on_the_creation_of_nodes_see_a_programs():
    leaves, told = known(), []
    with torch.autograd.graph.node_creation_hook(lambda node: told.append((node.name(), len(node.next_functions)))):
        y = layer_norm(*leaves)
    assert y.grad_fn.name() == PROGRAM
    assert told[-1] == (PROGRAM, 3)  # behind those of leaves
    assert len(told) == 1 + 3


def test_transforms_forward_mode_and_compilers_are_not_in_its_way():
    x, weight, bias = known()
    with use_backend("auto"):
        jacobian = torch.func.jacrev(lambda x: layer_norm(x, weight, bias).sum(-1))(x.detach())
    assert jacobian.shape == (ROWS, ROWS, WIDTH)
    with use_backend("auto"), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(layer_norm(dual, weight, bias)).tangent is not None
    torch._dynamo.reset()
    compiled = torch.compile(layer_norm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, bias), layer_norm(x, weight, bias))


def test_forward_mode_reaches_what_has_a_program():
    layer = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)
    x, tangent = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        with use_backend("auto", attention="eager"), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None


def test_where_backwards_are_compiled_nodes_are_pythons():
    leaves = known()
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        y = layer_norm(*leaves)
        assert PROGRAM not in nodes(y)
        y.sum().backward()
    assert leaves[0].grad is not None


def test_the_newer_setting_of_fp32_products_tells_calls_apart(monkeypatch):
    leaves = known()
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            layer_norm(*leaves)
            ops.linear_add_layer_norm(*leaves_of(CASES["linear_add_layer_norm"][2]))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_gradient_of_another_kind_is_no_part_of_a_graph():
    leaves = known()
    y = layer_norm(*leaves)
    dy = torch.randn(ROWS, WIDTH)
    found = torch.autograd.grad(y, leaves, torch._neg_view(-dy), retain_graph=True)
    assert not any(g.requires_grad for g in found)
    assert all(map(torch.equal, found, torch.autograd.grad(y, leaves, dy)))


def test_a_default_device_is_nobody_who_looks():
    leaves = known()
    torch.set_default_device("cpu")
    try:
        assert PROGRAM in nodes(layer_norm(*leaves))
    finally:
        torch.set_default_device(None)


def test_a_call_that_met_another_ones_recording_is_recorded_later():
    leaves = leaves_of(NORM)
    step(layer_norm, leaves)
    with host_program._lock:
        step(layer_norm, leaves)
    assert PROGRAM not in nodes(in_python(lambda: layer_norm(*leaves)))
    step(layer_norm, leaves)
    assert PROGRAM in nodes(layer_norm(*leaves))


def test_a_decision_made_under_another_request_is_not_kept(monkeypatch):
    leaves = leaves_of(NORM)
    real = LAYER_NORM._choose

    def meanwhile(args):  # another thread asks for something else while this one decides
        found = real(args)
        asking.__enter__()
        return found

    asking = use_backend(layer_norm="eager")
    monkeypatch.setattr(LAYER_NORM, "_choose", meanwhile)
    LAYER_NORM.choose(leaves[0], (WIDTH,), *leaves[1:], 1e-5)
    monkeypatch.undo()
    try:
        assert LAYER_NORM.choose(leaves[0], (WIDTH,), *leaves[1:], 1e-5).name == "eager"
    finally:
        asking.__exit__(None, None, None)


def test_tensors_of_inference_mode_spoil_nothing_for_others():
    with torch.inference_mode():
        inference = [torch.randn(shape) for shape in NORM]
    for _ in range(3):
        layer_norm(*inference)
    known()


def test_a_second_backward_needs_retain_graph_and_sees_what_changed_in_place():
    leaves = known()
    y = layer_norm(*leaves)
    torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    torch.autograd.grad(y.sum(), leaves)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), leaves)
    y = layer_norm(*leaves)
    with torch.no_grad():
        leaves[0].mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(y.sum(), leaves)


def test_nothing_is_kept_once_the_graph_is_gone():
    leaves = known()
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    y = layer_norm(x, *leaves[1:])
    seen = [weakref.ref(one) for one in (x, y)]
    del x, y
    gc.collect()
    assert [one() for one in seen] == [None, None]


def test_outputs_hooks_and_leaves_of_other_threads_work():
    leaves = known()
    found = []
    y = layer_norm(*leaves)
    y.register_hook(lambda dy: dy * 2)
    y.retain_grad()
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(y.sum(), leaves)))
    thread.start()
    thread.join()
    expected = torch.autograd.grad(layer_norm(*leaves).sum() * 2, leaves)
    assert all(map(torch.allclose, found, expected))


def test_what_fails_says_so_as_before():
    known()
    with pytest.raises(RuntimeError, match="normalized_shape"):
        layer_norm(torch.randn(2, WIDTH + 1), torch.ones(WIDTH), torch.ones(WIDTH))


def test_calls_with_other_settings_are_other_programs():
    x, weight, bias = known()
    for eps in (1e-5, 1.0):
        for _ in range(3):
            found = ops.layer_norm(x, (WIDTH,), weight, bias, eps)
            assert torch.equal(found, in_python(lambda eps=eps: ops.layer_norm(x, (WIDTH,), weight, bias, eps)))


def test_no_program_outlives_what_it_was_made_of(host):
    known()
    assert any(type(one).__name__ == "Program" for one in forward.native.programs())
    host.forget()
    assert forward.native.programs() == []


def test_which_of_many_tensors_overlap_is_part_of_what_tells_calls_apart(host):
    def tensors(one, other):
        """So many, two of which are the same memory."""
        found = [torch.empty(4) for _ in range(259)]
        found[other] = found[one].view(4)
        return found

    decisions = host.Decisions(8)
    decisions.put("first and last", host.stamp(), tensors(0, 258))
    assert decisions.get(tensors(0, 258)) == "first and last"
    assert decisions.get(tensors(1, 2)) is None


def test_shapes_that_vary_for_ever_do_not_fill_the_memory(host):
    decisions, repeated = host.Decisions(8), host.Repeated(lambda x: x, lambda x: None, -1, 8)
    for rows in range(1, 40):
        x = torch.empty(rows)
        decisions.put(rows, host.stamp(), x)
        assert decisions.get(x) == rows
        assert repeated(x) is x
        assert len(repeated.programs()) <= 8
    assert decisions.get(torch.empty(1)) is None


def test_shapes_that_vary_for_ever_are_soon_recorded_no_more(host):
    """What recordings cost, calls of programs have to pay for; a shape that comes often is recorded all the same."""
    recorded, program = [], None

    def record(x, *_):
        recorded.append(len(x))
        return program

    def meet(rows, times):
        given = torch.randn(rows, WIDTH), torch.randn(WIDTH), None, 1e-5, torch.float32, True
        for _ in range(times):
            repeated(*given)
        return recorded.count(rows)

    repeated = host.Repeated(lambda *given: given, record, -1, 4096)
    assert [meet(rows, 6) for rows in range(1, 41)] == [1] * 32 + [0] * 8
    assert meet(50, 16) == 0
    assert meet(50, 1) == 1
    forward.native(*(given := (torch.randn(60, WIDTH), torch.randn(WIDTH), None, 1e-5, torch.float32, True)))
    forward.native(*given)
    (program,) = (one for one in forward.native.programs() if type(one).__name__ == "Program")
    assert meet(60, 17 + 16) == 1
    program = None
    assert meet(61, 2) == 1
    assert meet(62, 2) == 0
    host.forget()
    assert meet(62, 2) == 1
