"""Linear assignment of a batch of problems: the contract, its reference by SciPy, its Triton kernel."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import assignment as kernels
from detr_fast.ops import regimes
from detr_fast.ops.boundary import SEVERAL_DEVICES, define, integers, on_one_device


def linear_assignment(cost: Tensor, counts: Tensor | None = None) -> Tensor:
    """Give each row of each problem a column of its own, so that the sum of their costs is the least possible.

    Shapes: cost (..., B, N, Q), N targets and Q queries; counts (B,) int64, how many of an image's N rows take part (all
    where None). Returns (..., B, N) int64, the column of each row; -1 where it has none, because it takes no part or
    because there are more rows than columns. Of several assignments of one total, any may come out.
    NaN and infinite costs outweigh all others, -inf the other way: as few such pairs as possible are made, and the others at
    the least total (by the Triton kernel where no finite cost is beyond ±1e35). Totals of numbers equal
    `scipy.optimize.linear_sum_assignment`'s. There is no gradient. Raises ValueError where the shapes do not fit, TypeError
    where counts are no integers (others than int64 are converted).
    Sources: Jonker and Volgenant, 1987, Computing 38; Crouse, 2016, IEEE TAES 52(4).
    """
    if cost.ndim < 2 or (counts is not None and (cost.ndim < 3 or tuple(counts.shape) != (cost.shape[-3],))):
        raise ValueError(
            f"got costs of shape {tuple(cost.shape)} and counts of shape {None if counts is None else tuple(counts.shape)}; "
            "expected (..., B, N, Q) and (B,)"
        )
    if cost.is_meta and not dispatch.intervening:  # nothing to solve; who asks by name wants to count
        return cost.new_empty(cost.shape[:-1], dtype=torch.int64)
    if counts is None:
        counts = torch.full((1,), cost.shape[-2], dtype=torch.int64, device=cost.device)
    return LINEAR_ASSIGNMENT(cost.detach(), *integers(counts=counts))


@dataclass(frozen=True)
class AssignmentCall(Call):
    problems: int
    targets: int
    queries: int
    one_device: bool

    def shapes(self) -> str:
        return f"{self.problems} × ({self.targets}, {self.queries}) {str(self.dtype).removeprefix('torch.')}"


def _signature(cost: Tensor, counts: Tensor) -> tuple[Any, ...]:
    return cost.shape, cost.dtype, *((type(t), t.device) for t in (cost, counts))


def _describe(cost: Tensor, counts: Tensor, *, situation: Situation) -> AssignmentCall:
    return AssignmentCall(
        device=cost.device,
        architecture=dispatch.architecture(cost.device),
        dtype=cost.dtype,
        tensor_type=dispatch.tensor_type((cost, counts)),
        needs_grad=False,
        situation=situation,
        problems=cost.shape[:-2].numel(),
        targets=cost.shape[-2],
        queries=cost.shape[-1],
        one_device=on_one_device(cost, counts),
    )


class TritonAssignment(TritonImplementation):
    dtypes = frozenset({torch.float32})

    def why_not(self, call: AssignmentCall) -> str | None:
        if not call.one_device:
            return SEVERAL_DEVICES
        if call.targets > kernels.MAX_TARGETS or call.queries > kernels.MAX_QUERIES:
            return (
                f"{call.targets} targets and {call.queries} queries: "
                f"it takes up to {kernels.MAX_TARGETS} and {kernels.MAX_QUERIES}"
            )
        return None

    def advice(self, call: AssignmentCall) -> str | None:
        if regimes.find("linear_assignment", call.architecture) is None:
            return None  # unmeasured; but the host need not wait for it, and every other way does
        return regimes.advice("linear_assignment", call, call.targets**2 * call.queries, "the host")

    def note(self, call: AssignmentCall) -> str | None:
        return regimes.note("linear_assignment", call)

    def compiled_key(self, call: AssignmentCall) -> Any:
        return call.device, max(call.targets, call.queries)

    def prepare(self, call: AssignmentCall) -> None:
        kernels.compile_linear_assignment(call.targets, call.queries, call.device)

    def run(self, cost: Tensor, counts: Tensor) -> Tensor:
        return _assign(cost, counts)


class SciPyAssignment(Implementation):
    """Problem by problem on the host, where the costs are."""

    name = "scipy"
    devices = frozenset({"cpu"})

    def advice(self, call: AssignmentCall) -> str | None:
        scans, measured = call.problems * call.targets**2 * call.queries, regimes.find("linear_assignment", "cpu")
        if measured is None or scans < measured.eager_minimum or _threads() == 1:
            return None
        return f"{scans:,} row scans (N² Q): from {measured.eager_minimum:,} on, threads are faster ({measured.source})"

    def run(self, cost: Tensor, counts: Tensor) -> Tensor:
        return _assign_on_host(cost, counts, 1)


class ThreadedAssignment(Implementation):
    """One transfer of all problems to the host, which shares them out among threads, and one back: SciPy holds no lock."""

    name = "threads"

    def why_not(self, call: AssignmentCall) -> str | None:
        if call.situation.regime == "captured":
            return "a CUDA graph is being captured, and the host can't take part in it"
        return None

    def run(self, cost: Tensor, counts: Tensor) -> Tensor:
        return _assign_on_host(cost, counts, _threads())


LINEAR_ASSIGNMENT = Op(
    "linear_assignment",
    signature=_signature,
    describe=_describe,
    implementations=(TritonAssignment(), SciPyAssignment(), ThreadedAssignment()),
)


@cache
def _threads() -> int:
    return max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="detr-fast-assignment")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _as_finite(cost: Any) -> Any:
    """Costs (N, Q), a NumPy array, with a number in place of those that are none: as the kernel's `_over_all`."""
    import numpy as np

    finite = np.isfinite(cost)
    if finite.all():
        return cost
    limit = np.abs(cost[finite]).max(initial=0.0) * (2 * min(cost.shape) + 1) or 1.0
    return np.nan_to_num(cost, nan=limit, posinf=limit, neginf=-limit)


def _on_host(cost: Tensor, counts: Tensor, threads: int) -> Tensor:
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    host = torch.cat((cost.flatten().double(), counts.double())).cpu()  # one transfer
    problems = host[: cost.numel()].reshape(cost.shape[:-2].numel(), *cost.shape[-2:])
    rows = host[cost.numel() :].long().clamp(0, cost.shape[-2])
    rows = rows.repeat(problems.shape[0] // max(1, rows.numel()))
    result = np.full(problems.shape[:2], -1, dtype=np.int64)
    work = list(zip(problems.numpy(), rows.tolist(), result))

    def solve(part: list[Any]) -> None:
        for problem, count, own in part:
            if count:
                row, column = linear_sum_assignment(_as_finite(problem[:count]))
                own[row] = column

    if threads == 1:
        solve(work)
    else:
        list(_pool(threads).map(solve, (work[first::threads] for first in range(threads))))
    return torch.from_numpy(result).reshape(cost.shape[:-1]).to(cost.device, non_blocking=True)


def _run(cost: Tensor, counts: Tensor) -> Tensor:
    problems = cost.reshape(cost.shape[:-2].numel(), *cost.shape[-2:])
    return kernels.linear_assignment(problems, counts).view(cost.shape[:-1])


def _fake(cost: Tensor, counts: Tensor, threads: int = 1) -> Tensor:
    return cost.new_empty(cost.shape[:-1], dtype=torch.int64)


def _autograd(cost: Tensor, counts: Tensor) -> Tensor:
    return _assign.below(cost, counts)


def _autograd_on_host(cost: Tensor, counts: Tensor, threads: int) -> Tensor:
    return _assign_on_host.below(cost, counts, threads)


_assign = define("linear_assignment(Tensor cost, Tensor counts) -> Tensor", run=_run, fake=_fake, autograd=_autograd)
_assign_on_host = define(
    "linear_assignment_on_host(Tensor cost, Tensor counts, int threads) -> Tensor",
    run=_on_host,
    fake=_fake,
    autograd=_autograd_on_host,
    on_cpu=_on_host,
)
