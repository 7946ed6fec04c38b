from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import detr_fast
from detr_fast import dispatch, ops
from detr_fast.dispatch import BackendError, Call, Implementation, Op, use_backend
from detr_fast.explanation import explaining
from tests.forked import status_of


class Doubling(Implementation):
    name = "fused"
    dtypes = frozenset({torch.float32})
    plain = True

    def __init__(self) -> None:
        self.prepared = 0
        self.failure: Exception | None = None
        self.slow: str | None = None

    def why_not(self, call: Call) -> str | None:
        return "needs no gradient" if call.needs_grad else None

    def advice(self, call: Call) -> str | None:
        return self.slow

    def prepare(self, call: Call) -> None:
        self.prepared += 1
        if self.failure is not None:
            raise self.failure

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Plain(Implementation):
    name = "eager"

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


@pytest.fixture
def op(monkeypatch):
    monkeypatch.setattr(dispatch, "_ops", dict(dispatch._ops))

    def describe(x, *, situation):
        return Call(x.device, None, x.dtype, dispatch.tensor_type((x,)), x.requires_grad, situation)

    return Op(
        "doubling",
        signature=lambda x: (type(x), x.shape, x.dtype, x.requires_grad),
        describe=describe,
        implementations=(Doubling(), Plain()),
    )


def test_auto_takes_the_first_implementation_without_a_reason_against_it(op):
    assert op.choose(torch.ones(2)).name == "fused"
    assert op.choose(torch.ones(2, dtype=torch.float64)).name == "eager"
    assert op.choose(torch.ones(2, requires_grad=True)).name == "eager"


def test_a_decision_is_made_once_per_signature_and_again_when_the_situation_changes(op):
    fused = op.implementations[0]
    op(torch.ones(2)), op(torch.ones(2))
    assert fused.prepared == 1
    op(torch.ones(3))
    assert fused.prepared == 2
    with torch.no_grad():
        op(torch.ones(2))
    assert fused.prepared == 3


def test_asking_by_name_never_falls_back_silently(op):
    with use_backend(doubling="fused"), pytest.raises(BackendError, match=r"float64 inputs: it takes float32"):
        op(torch.ones(2, dtype=torch.float64))
    with use_backend(doubling="eager"):
        assert op.choose(torch.ones(2)).name == "eager"


def test_asking_for_all_ops_binds_only_those_that_have_it(op):
    with use_backend("sdpa"):
        assert op.choose(torch.ones(2)).name == "fused"
        with use_backend("eager"):
            assert op.choose(torch.ones(2)).name == "eager"
            with use_backend(doubling="auto"):
                assert op.choose(torch.ones(2)).name == "fused"


def test_what_is_slow_is_refused_by_auto_but_taken_by_name(op):
    op.implementations[0].slow = "measured slower than eager below 4,096 rows"
    assert op.choose(torch.ones(2)).name == "eager"
    with use_backend(doubling="fused"):
        assert op.choose(torch.ones(2)).name == "fused"


def test_what_could_run_in_parts_does_not_ask_where_the_answer_is_always_no(unmeasured, monkeypatch):
    product = ops.feed_forward.__globals__["FEED_FORWARD"]
    arguments = (
        torch.ones(2, 4),
        torch.ones(3, 4),
        None,
        torch.ones(4, 3),
        None,
        None,
        None,
        0.0,
        "relu",
        0.0,
        0.0,
        None,
        False,
    )
    asked = []
    monkeypatch.setattr(product, "_decision", lambda *_: asked.append(1) or pytest.fail("asked"))
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    product.forget()
    assert product.kernel(*arguments) is None
    monkeypatch.undo()
    product.forget()
    with explaining() as records:  # who wants to know hears why
        assert product.kernel(*arguments) is None
    assert [r.chosen for r in records] == ["its parts"]
    with use_backend("eager"):
        assert product.kernel(*arguments) is None
    product.forget()


def test_an_unknown_op_or_implementation_is_an_error_that_lists_the_known(op):
    with (
        pytest.raises(ValueError, match=r"no op 'atention'; the ops are .*attention, .*doubling, .*layer_norm"),
        use_backend(atention="eager"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"doubling has no implementation 'cuda'; choose from eager, fused or auto"),
        use_backend(doubling="cuda"),
    ):
        pass


def test_a_kernel_that_fails_to_compile_falls_back_once_and_loudly(op):
    op.implementations[0].failure = RuntimeError("ptxas died\nof something")
    with pytest.warns(RuntimeWarning, match=r"doubling .* falls back from 'fused'.*ptxas died\)"):
        assert torch.equal(op(torch.ones(2)), torch.full((2,), 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op(torch.ones(2))
    assert op.implementations[0].prepared == 1


def test_a_kernel_that_fails_to_compile_raises_when_asked_for_by_name(op):
    op.implementations[0].failure = RuntimeError("ptxas died")
    with use_backend(doubling="fused"), pytest.raises(BackendError, match=r"failed to compile .*ptxas died"):
        op(torch.ones(2))


# As PyTorch, Python, Triton's driver and PyTorch's streams say it.
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("in_cpp", [False, True])
def test_a_kernel_that_finds_no_memory_falls_back_for_this_call_alone(op, error, in_cpp, request):
    if in_cpp:
        request.getfixturevalue("host")
    fused = op.implementations[0]
    fused.failure = error
    with use_backend(doubling="fused"), pytest.raises(type(error)) as raised:
        op(torch.ones(2))
    assert raised.value is error
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=r"doubling .* falls back from 'fused' for this call: .*no memory"):
            assert op.choose(torch.ones(2)).name == "eager"
    fused.failure = None
    assert op.choose(torch.ones(2)).name == "fused"


def test_a_failure_of_the_machine_that_compiles_is_told_from_one_of_the_kernel(op):
    op.implementations[0].failure = OSError(28, "No space left on device", "/cache/triton")
    with pytest.warns(RuntimeWarning, match=r"No space left on device: '/cache/triton'.*TRITON_CACHE_DIR") as warned:
        op(torch.ones(2))
    assert "report" not in str(warned[0].message)
    assert op.choose(torch.ones(2)).name == "eager"
    assert op.implementations[0].prepared == 1


def test_transforms_and_tensor_subclasses_take_the_eager_implementation(op):
    seen = []

    def f(x):
        seen.append(op.choose(x).name)
        return op(x)

    assert torch.equal(torch.vmap(f)(torch.ones(3)), torch.full((3,), 2.0))
    torch.func.jvp(f, (torch.ones(2),), (torch.ones(2),))

    class Mine(torch.Tensor):
        pass

    seen.append(op.choose(torch.ones(2).as_subclass(Mine)).name)
    assert seen == ["eager"] * 3


def test_overrides_hold_in_other_threads_and_blocks_may_be_left_in_any_order(op):
    names: list[str] = []
    with use_backend(doubling="eager"):
        thread = threading.Thread(target=lambda: names.append(op.choose(torch.ones(2)).name))
        thread.start()
        thread.join()
    first, second = use_backend(doubling="eager"), use_backend(doubling="fused")
    first.__enter__(), second.__enter__(), first.__exit__(None, None, None)
    names.append(op.choose(torch.ones(2)).name)
    second.__exit__(None, None, None)
    assert names == ["eager", "fused"]
    assert not dispatch.intervening


def test_use_backend_holds_in_a_checkpoint_recomputed_during_backward(op):
    names = []

    def f(x):
        names.append(op.choose(x).name)
        return op(x) * x

    with use_backend(doubling="eager"):
        x = torch.ones(2, requires_grad=True)
        torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False).sum().backward()
    assert names == ["eager", "eager"]


def test_two_threads_calling_one_op_get_the_same_results(op):
    results = []
    threads = [
        threading.Thread(
            target=lambda n=n: results.extend(op(torch.full((n,), 3.0)).sum().item() / n for n in range(1, 50))
        )
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [6.0] * (49 * 4)


def test_explain_names_modules_shapes_choices_and_reasons(capsys):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = detr_fast.nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(self.norm(x))

    records = detr_fast.explain(torch.nn.Sequential(Block()), torch.ones(3, 8))
    assert [(r.module, r.op, r.chosen, r.calls) for r in records] == [("0.norm", "layer_norm", "eager", 2)]
    assert "GPU" in records[0].reasons["triton"]
    assert capsys.readouterr().out.startswith("0.norm: layer_norm (3, 8) float32 -> eager ×2")
    assert records.as_dicts()[0]["module"] == "0.norm"
    assert not dispatch.intervening


def test_explaining_a_model_that_raises_leaves_no_trace(op):
    model = torch.nn.Linear(2, 3)
    with pytest.raises(RuntimeError), explaining(model):
        model(torch.ones(5))
    assert not dispatch.intervening


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("eager", "eager"),
        ("layer_norm=eager", "eager"),
        ("layer_norm=triton", "BackendError"),
        ("nonsense", "DETR_FAST_BACKEND='nonsense': no op has an implementation 'nonsense'"),
    ],
)
def test_the_environment_variable_asks_by_name(setting, expected):
    code = (
        "import torch, detr_fast\n"
        "try: print(detr_fast.explain(detr_fast.nn.LayerNorm(4), torch.ones(2, 4), quiet=True)[0].chosen)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {"DETR_FAST_BACKEND": setting, "PATH": "", "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert expected in run.stdout, run.stderr


def test_a_failed_compilation_is_not_tried_again_for_every_new_shape(op):
    fused = op.implementations[0]
    fused.failure = RuntimeError("ptxas died")
    fused.compiled_key = lambda call: call.dtype
    with pytest.warns(RuntimeWarning, match="ptxas died"):
        op(torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in range(2, 5):
            op(torch.ones(rows))
    assert fused.prepared == 1


def test_shapes_that_vary_for_ever_do_not_fill_the_memory(op, monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_DECISIONS", 3)
    for rows in range(20):
        op(torch.ones(rows))
    assert len(op._decisions) <= 3


def test_meta_tensors_and_the_new_precision_settings_are_no_obstacle(op):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with use_backend("eager"):
            assert op(torch.ones(2, device="meta")).device.type == "meta"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_while_another_thread_decides_is_not_held_up():
    held, done = threading.Event(), threading.Event()

    def hold():
        with dispatch._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = os.fork()
    if child == 0:
        with use_backend("eager"):
            os._exit(0)
    try:
        assert status_of(child) == 0
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("name", ["layer_norm", "linear_cross_entropy"])
def test_a_table_that_comes_while_a_compiler_traces_is_no_obstacle(name, monkeypatch):
    """The part in C++ brings it, whenever it is compiled."""
    tensors = {"layer_norm": ((2, 4), (4,)), "linear_cross_entropy": ((2, 4), (5, 4))}[name]
    x, weight = map(torch.ones, tensors)
    rest = (None, torch.tensor([1, 2])) if name == "linear_cross_entropy" else ()
    found = dispatch._ops[name]

    def backend(graph, _):
        for table in ("_known", "_known_kernels"):
            monkeypatch.setattr(found, table, object())
        return graph.forward

    def call(x, weight):
        return getattr(ops, name)(x, *(((4,),) if name == "layer_norm" else ()), weight, *rest)

    for table in ("_known", "_known_kernels"):
        monkeypatch.setattr(found, table, None)
    torch.compiler.reset()
    with use_backend(**{name: "eager"}):
        expected = call(x, weight)
        torch.testing.assert_close(torch.compile(call, backend=backend, fullgraph=True)(x, weight), expected)
