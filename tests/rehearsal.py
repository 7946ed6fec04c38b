"""`make gpu` without a GPU: tests and benchmarks run their bodies on the CPU, everything small; scripts likewise.

    export DETR_FAST_REHEARSAL=1 TRITON_INTERPRET=1
    python -m pytest -p tests.rehearsal -m gpu tests benchmarks      # each value of each parameter at least once
    python -m tests.rehearsal benchmarks/kernel_calls.py graphs      # on meta tensors: no kernel runs
    python -m tests.rehearsal benchmarks.step_profile FOLDER         # a tiny step
    DETR_FAST_CACHE=FOLDER python -m tests.rehearsal tune            # of tiny sizes, timed by the host's clock

Kernels run in the checked interpreter and torch.compile compiles nothing: this shows that the bodies run and that what they
assert of results holds, so that their first run on a GPU does not end in a typo.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.stub_cuda import conv2d, stubs


def pytest_configure(config):
    from benchmarks import hardware

    if not hardware.REHEARSAL:
        raise pytest.UsageError("set DETR_FAST_REHEARSAL=1 and TRITON_INTERPRET=1: nothing would be small else")
    _in_place_of_cuda()


def _in_place_of_cuda():
    from benchmarks import timing
    from detr_fast.engine import captured

    for name, value in stubs().items():
        setattr(torch.cuda, name, value)
    torch.compile = lambda function=None, **options: function
    torch.nn.functional.conv2d = conv2d
    captured.why_no_graph = lambda *_: None
    timing._wall = lambda call, repeats: 1.0  # a call saved: another is timed as the GPU's


def pytest_collection_modifyitems(items):
    """Of each test as few cases as hold every value of every parameter."""
    seen: set[tuple[object, ...]] = set()
    kept = []
    for item in items:
        values = {
            (item.path, item.originalname, name, repr(value))
            for name, value in getattr(getattr(item, "callspec", None), "params", {}).items()
        }
        if values - seen or not values:
            kept.append(item)
        seen |= values
    items[:] = kept


@pytest.fixture(autouse=True)
def _in_the_checked_interpreter():
    from detr_fast.testing.interpreter import checked_interpreter

    torch.manual_seed(0)
    with checked_interpreter(int32_limit=1 << 22):
        yield


def _script(path: str, arguments: list[str]) -> int:
    """A script of benchmarks/ on meta tensors."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DEVICE = torch.device("meta")
    return module.main(arguments)


def _tune() -> int:
    """`detr-fast tune` on one tiny case of each kind, each timed once."""
    if "DETR_FAST_CACHE" not in os.environ:
        raise SystemExit("set DETR_FAST_CACHE: this user's programs would go by what is measured here")
    from detr_fast.kernels import overlap

    from detr_fast import dispatch
    from detr_fast.cli import main
    from detr_fast.nn import layer_cases
    from detr_fast.ops import tuning, tuning_cases
    from detr_fast.testing.interpreter import checked_interpreter

    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda self: None  # it would ask the stream
    overlap.is_able = lambda architecture: False  # the interpreter's launches can't
    dispatch.architecture = lambda device: "sm_90"
    step, cpu = tuning.assignment_step, torch.device("cpu")
    tuning.assignment_step = lambda *_: step(cpu, 2, 2, 4)
    tuning_cases.WIDTH, tuning_cases.HIDDEN, tuning_cases.TOKENS = 64, 48, 12
    tuning_cases.HEADS, tuning_cases.QUERIES = 1, 20  # an interpreted head's 16 points take seconds
    for module in (tuning, layer_cases):
        module.GROUPS = [_first_case(group) for group in module.GROUPS]
    interleaved, milliseconds = tuning._interleaved, tuning._milliseconds
    tuning._ROUNDS = 1
    # One op is timed as on a GPU; the others' steps only have to agree.
    tuning._interleaved = lambda step, op, backends, **options: (
        interleaved(step, op, backends, **options | {"repeats": 1}) if op == "matching_cost" else (1.0,) * len(backends)
    )
    tuning._milliseconds = lambda run, repeats: milliseconds(run, 1)
    with checked_interpreter(int32_limit=1 << 22):  # whose bf16 rounds as a GPU's
        main(["tune"])
    return 0


def _first_case(group):
    """The group with one tiny case, on the CPU."""
    layer = {"encoder_layer": (1, 6), "decoder_layer": (1, 6)}
    sizes = {
        "matching_cost": (1, 2, 5),
        "linear_cross_entropy": (6, 16),
        "deformable_attention": (1, 2),
        "optimizer_step": (1, 8, 16),
        "cast_together": (1, 8, 16),
        "prediction_heads": (1,),
    } | layer

    def tiny(make):
        function, size = make.args
        small = sizes.get(group.op, (2,))
        if group.op == "attention":
            small = (1, 2 if size[1] < size[2] else 9, 9, 2, *size[4:])
        elif group.op == "attention_varlen":
            small = (1, *size[1:])
        elif group.op in ("pointwise_affine", "bottlenecks"):
            small = (size[0]._replace(images=1, pixels=(2, 3), width=8, channels=16),)
        return lambda _, gradients: make.func(function, small, torch.device("cpu"), gradients)

    case = group.cases[0]
    made = {name: tiny(make) for name in ("make", "checked") if (make := getattr(case, name)) is not None}
    return dataclasses.replace(group, cases=(dataclasses.replace(case, **made),))


def _profile(folder: str) -> int:
    from benchmarks import step_profile

    return step_profile.main(Path(folder))


if __name__ == "__main__":
    _in_place_of_cuda()
    if sys.argv[1] == "tune":
        sys.exit(_tune())
    sys.exit(_profile(sys.argv[2]) if sys.argv[1] == "benchmarks.step_profile" else _script(sys.argv[1], sys.argv[2:]))
