"""What a launcher does when it is called again with arguments of the same kind: the same launches, on the same places."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from detr_fast.kernels import launch, layer_norm, repeat
from torch import Tensor

from benchmarks.test_host_time import CASES
from detr_fast import dispatch, implementation, ops, use_backend
from detr_fast.ops import boundary
from detr_fast.ops.dropout import shared_seed

pytestmark = pytest.mark.offline


class Launched(NamedTuple):
    variant: launch.Variant
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


class Program:
    """A program that is never compiled, and whose launches are written down."""

    function = metadata = None

    def __init__(self, variant: launch.Variant, log: list[Launched]) -> None:
        self.variant, self.log = variant, log
        self.constants = tuple(variant.constants.values())

    def __call__(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        self.run(*(*grid, 1, 1)[:3], 0, None, None, None, None, None, *arguments, *self.constants)

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        self.log.append(Launched(self.variant, (x, y, z), rest[6:]))


@pytest.fixture
def log(stub_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launched]]:
    """Ops take CPU tensors to their kernels, whose launches are written down; what they allocate stays."""
    found: list[Launched] = []
    kept: list[Tensor] = []
    monkeypatch.setattr(launch.Variant, "program", lambda variant, device: Program(variant, found))
    for module in (implementation, boundary):
        monkeypatch.setattr(module, "INTERPRETING", True)
    for name in ("empty", "empty_like", "empty_strided"):
        allocate = getattr(torch, name)
        keep = lambda *a, allocate=allocate, **options: kept.append(allocate(*a, **options)) or kept[-1]  # noqa: E731
        monkeypatch.setattr(torch, name, keep)
    monkeypatch.setattr(launch, "_allocate", torch.empty)
    with use_backend("triton"):
        yield found
    dispatch.forget_decisions()


MANY = torch.arange(600)[None] > 500
EXTRA = {
    "attention over few queries": (
        partial(ops.attention, key_padding_mask=MANY),
        [(1, 5, 2, 32), *[(1, 600, 2, 32)] * 2],
    ),
    "attention of packed heads": (
        lambda qkv, bias: ops.attention(*qkv.unflatten(-1, (3, 2, 32)).unbind(2), attn_mask=bias, is_causal=True),
        [(2, 7, 192), (7, 7)],
    ),
    "attention, sequence first": (
        lambda q, k, v: ops.attention(*(t.transpose(0, 1) for t in (q, k, v)), dropout_p=0.1),
        [(5, 2, 2, 24), (9, 2, 2, 24), (9, 2, 2, 24)],
    ),
    "layer_norm of 9,000 columns": (lambda x: ops.layer_norm(x, (9000,)), [(3, 9000)]),
}
EVERY = {name: (function, shapes) for name, (function, _, shapes) in CASES.items()} | EXTRA


def step(function: Any, shapes: Any, seed: int = 0) -> Any:
    leaves = [torch.zeros(shape, requires_grad=True) for shape in shapes]

    def run() -> list[Tensor]:
        torch.manual_seed(seed)
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, torch.zeros_like(y))]

    return run


def assert_alike(first: list[Launched], again: list[Launched]) -> None:
    """The same launches of the same programs, with pointers to memory that is told apart in the same way."""
    assert [(one.variant, one.grid) for one in first] == [(one.variant, one.grid) for one in again]
    moved: dict[int, tuple[int, int]] = {}  # start of each piece of memory: start of the other, and its size
    for one, other in zip(first, again):
        for kind, was, found in itertools.zip_longest(one.variant.types, one.arguments, other.arguments):
            if not isinstance(was, Tensor):
                assert found == was
                continue
            assert kind.startswith("*")
            found = found.data_ptr() if isinstance(found, Tensor) else found
            storage = was.untyped_storage()
            start = found - (was.data_ptr() - storage.data_ptr())
            assert moved.setdefault(storage.data_ptr(), (start, storage.nbytes())) == (start, storage.nbytes())
            assert found % 16 == was.data_ptr() % 16
    pieces = sorted(moved.values())
    assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(pieces))


def tensors_of(program: Any) -> list[Tensor]:
    made = [*program.results, *([] if program.scratch is None else [program.scratch])]
    return [a for one in made for a in one.args if isinstance(a, Tensor)]


@pytest.mark.parametrize("name", EVERY)
def test_what_is_repeated_is_what_was_done(log: list[Launched], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = step(*EVERY[name])
    logs, results = [], []
    for _ in range(3):
        results.append(run())
        logs.append(log.copy())
        log.clear()
    assert_alike(logs[0], logs[2])
    described = [[(t.shape, t.stride(), t.dtype) for t in found] for found in results]
    assert described[0] == described[2]
    held = [a for known in repeat._known for program in known.values() if program for a in tensors_of(program)]
    assert held
    assert all(t.untyped_storage().nbytes() == 0 for t in held)
    repeats = [one for one in logs[2] if not any(isinstance(a, Tensor) for a in one.arguments)]
    assert repeats


def pointers(log: list[Launched]) -> list[int | None]:
    """Addresses of the last launch's pointers."""
    kinds = zip(log[-1].variant.types, log[-1].arguments)
    return [a.data_ptr() if isinstance(a, Tensor) else a for kind, a in kinds if kind and kind[0] == "*"]


def numbers(one: Launched) -> list[Any]:
    """All arguments but pointers."""
    kinds = itertools.zip_longest(one.variant.types, one.arguments, fillvalue="")
    return [a for kind, a in kinds if kind is not None and not kind.startswith("*")]


def was_repeated(log: list[Launched]) -> bool:
    return not any(isinstance(a, Tensor) for a in log[-1].arguments)


def test_each_call_has_its_own_arguments_and_results(log: list[Launched]) -> None:
    norm = repeat.repeated(layer_norm.layer_norm_forward)
    weight, bias = torch.zeros(64), torch.zeros(64)
    for count in range(5):
        x = torch.zeros(4, 64)
        results = norm(x, weight, bias, 1e-5)
        assert pointers(log) == [t.data_ptr() for t in (x, weight, bias, *results)]
        assert was_repeated(log) == (count >= 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b, eps: (torch.zeros(5, 64), w, b, eps),
        lambda x, w, b, eps: (torch.zeros(4, 128)[:, :64], w, b, eps),
        lambda x, w, b, eps: (torch.zeros(257)[1:].view(4, 64), w, b, eps),
        lambda x, w, b, eps: (x, w, w, eps),
        lambda x, w, b, eps: (x, w, None, eps),
        lambda x, w, b, eps: (x, w, b, 1e-6),
        lambda x, w, b, eps: (x.half(), w.half(), b.half(), eps),
    ],
    ids=["shape", "strides", "alignment", "one tensor twice", "a tensor less", "setting", "dtype"],
)
def test_what_launches_depend_on_tells_calls_apart(log: list[Launched], change: Any) -> None:
    arguments = (torch.zeros(4, 64), torch.zeros(64), torch.zeros(64), 1e-5)
    changed = change(*arguments)
    for first, second in ((arguments, changed), (changed, arguments)):
        norm = repeat.repeated(layer_norm.layer_norm_forward)
        for _ in range(3):
            norm(*first)
        for given in (second, second, second, first):
            expected = layer_norm.layer_norm_forward(*given)
            wanted = log[-1]
            found = norm(*given)
            assert (log[-1].variant, log[-1].grid) == (wanted.variant, wanted.grid)
            assert pointers(log) == [t.data_ptr() for t in (*given, *found) if isinstance(t, Tensor)]
            assert numbers(log[-1]) == numbers(wanted)
            assert [(t.shape, t.stride(), t.dtype) for t in found] == [(t.shape, t.stride(), t.dtype) for t in expected]
        assert was_repeated(log)


def test_layers_that_differ_in_their_dropouts_offset_alone_are_one_and_draw_by_their_own(log: list[Launched]) -> None:
    def stack(x: Tensor, *parameters: Tensor) -> Tensor:
        with shared_seed():
            for _ in range(4):
                x = ops.add_layer_norm(x, x, *parameters, dropout_p=0.1)
                x = x + ops.attention(*[x.view(1, 4, 2, 32)] * 3, dropout_p=0.1).view(4, 64)
        return x

    run = step(stack, [(4, 64), (64,), (64,)])
    drawn = []
    for _ in range(2):
        log.clear()
        run()
        kinds = [(one, one.variant.kernel.arg_names) for one in log]
        drawn.append([one.arguments[names.index("offset")] for one, names in kinds if "offset" in names])
    assert drawn[0] == drawn[1]
    assert drawn[1][:8] == list(range(1, 9))
    assert was_repeated(log)
    assert all(len(programs) <= 1 for programs in repeat._known)


class Elsewhere(Tensor):
    """A tensor that says it lies on another device."""

    def get_device(self) -> int:
        return 7


def test_a_tensor_on_another_device_is_left_to_the_launcher_to_refuse(log: list[Launched]) -> None:
    norm, x, weight = repeat.repeated(layer_norm.layer_norm_forward), torch.zeros(4, 64), torch.zeros(64)
    for _ in range(3):
        norm(x, weight, None, 1e-5)
    assert was_repeated(log)
    norm(x, weight.as_subclass(Elsewhere), None, 1e-5)
    assert not was_repeated(log)


def test_an_operation_of_pytorchs_runs_in_each_call(log: list[Launched]) -> None:
    def filled(x: Tensor) -> Tensor:
        return layer_norm.layer_norm_forward(x, None, None, 1e-5)[1].fill_(7.0)

    norm = repeat.repeated(filled)
    for _ in range(4):
        assert norm(torch.zeros(4, 64)).tolist() == [7.0] * 4
        assert not was_repeated(log)


def test_who_looks_at_launches_or_allocations_sees_all_of_them(log: list[Launched], monkeypatch: Any) -> None:
    norm, x, seen = repeat.repeated(layer_norm.layer_norm_forward), torch.zeros(4, 64), []
    for _ in range(3):
        norm(x, None, None, 1e-5)
    with launch.allocating_with(lambda shape, dtype, device: torch.full(shape, torch.nan, dtype=dtype)):
        assert norm(x, None, None, 1e-5)[0].isnan().all()
    monkeypatch.setattr(launch, "observers", [seen.append])
    norm(x, None, None, 1e-5)
    assert [one.variant.name for one in seen] == ["layer_norm_forward_kernel"]
    monkeypatch.undo()


def test_a_forgotten_call_is_worked_out_anew(log: list[Launched]) -> None:
    norm, x = repeat.repeated(layer_norm.layer_norm_forward), torch.zeros(4, 64)
    for _ in range(3):
        norm(x, None, None, 1e-5)
    dispatch.forget_decisions()
    norm(x, None, None, 1e-5)
    assert not was_repeated(log)
