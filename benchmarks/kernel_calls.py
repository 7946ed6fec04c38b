"""What `make gpu` does with the example call of every catalog entry, beside tests and benchmarks.

python benchmarks/kernel_calls.py once               # one call of each example: what a sanitizer watches
python benchmarks/kernel_calls.py graphs             # no host synchronisation, and the same results from a CUDA graph
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from detr_fast.kernels.catalog import CATALOG, Entry
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda")


def examples() -> list[Entry]:
    """The first entry of each distinct example."""
    first: dict[object, Entry] = {}
    for one in CATALOG:
        first.setdefault(one.example, one)
    return list(first.values())


def once() -> int:
    for one in examples():
        with WithoutCublas():
            one.example(DEVICE)()
        torch.cuda.synchronize()
        print(f"{one.name}: ran", flush=True)
    return 0


class WithoutCublas(TorchDispatchMode):
    """Products of matrices by sums of products: racecheck (2025.3) stops at cuBLAS's kernels for sm_90, watched or not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = dict(zip((one.name for one in func._schema.arguments), args)) | (kwargs or {})
        names = {"mm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "addmm_": ("mat1", "mat2")}
        if (operands := names.get(func._schema.name.removeprefix("aten::"))) is None:
            return func(*args, **(kwargs or {}))
        a, b = (given[name] for name in operands)
        y = (a[:, :, None].float() * b[None].float()).sum(1) * given.get("alpha", 1)
        if operands[0] == "mat1":
            y += given.get("beta", 1) * given["self"].float()
        written = given["self"] if func._schema.name.endswith("_") else given.get("out")
        return y.to(given.get("out_dtype") or a.dtype) if written is None else written.copy_(y)


def graphs() -> int:
    """Status 1 where a call waits for the host, can't be captured, or gives other results when replayed."""
    problems = _in_processes([one.name for one in examples()])
    failed = 0
    for name, problem in problems:
        failed += problem is not None
        print(f"{name}: ok" if problem is None else f"FAILED {name}: {problem}", flush=True)
    return 1 if failed else 0


def _in_processes(names: list[str]) -> Iterator[tuple[str, str | None]]:
    """Each example's problem, in several processes: most of the time goes to compiling, and what breaks CUDA breaks few others."""
    workers = 1 if DEVICE.type != "cuda" else max(1, min(12, (os.cpu_count() or 2) - 2))
    if workers == 1:
        yield from ((name, _problem(name)) for name in names)
        return
    few = [names[i : i + 4] for i in range(0, len(names), 4)]
    with ThreadPoolExecutor(workers) as threads:
        for some, problems in zip(few, threads.map(_in_a_process, few)):
            yield from zip(some, problems)


def _in_a_process(names: list[str], judge: Callable[[str], str | None] | None = None) -> list[str | None]:
    """These examples' problems, one by one in a process; where one ends it, the next ones have another."""
    problems: list[str | None] = []
    while len(problems) < len(names):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                for problem in pool.map(judge or _problem, names[len(problems) :]):
                    problems.append(problem)
            except BrokenProcessPool:
                problems.append("the process ended in it")
    return problems


def _problem(name: str) -> str | None:
    try:
        return _captured(next(one for one in CATALOG if one.name == name))
    except Exception as error:  # each example is judged alone
        told = str(error).strip().splitlines()
        return f"{type(error).__name__}: {told[0] if told else 'no message'}"


def _captured(one: Entry) -> str | None:
    call = one.example(DEVICE)
    expected = [t.clone() for t in call()]  # compiles, too
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    wrong = sum(not _agree(a, b) for a, b in zip(outputs, expected))
    return f"{wrong} of {len(expected)} outputs differ when replayed" if wrong else None


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Equal, up to the order of atomic additions."""
    if found.is_meta or not found.is_floating_point():
        return found.is_meta or torch.equal(found, expected)
    return torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=1e-2, equal_nan=True)


def main(arguments: list[str]) -> int:
    torch.manual_seed(0)
    if arguments[:1] == ["once"]:
        return once()
    if arguments[:1] == ["graphs"]:
        return graphs()
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
