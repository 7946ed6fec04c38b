"""What users' machines do to kernels: full disks, odd GPUs, old drivers, several threads and processes.

Each works, or says why in one sentence and runs eagerly. Everything up to the GPU driver's door is real; the driver is a stub.
"""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from detr_fast.kernels import layer_norm
from triton.runtime import cache

from detr_fast import dispatch, ops, use_backend
from detr_fast.ops import regimes
from detr_fast.ops.layer_norm import LAYER_NORM, LayerNormCall
from detr_fast.ops.layouts import Layout

pytestmark = pytest.mark.offline


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """An empty Triton cache, no memory of kernels that failed, and no measurements."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(regimes, "known", tuple)  # nothing was measured
    LAYER_NORM.forget()
    yield
    LAYER_NORM.forget()


def decide(architecture="sm_90"):
    """The dispatcher's decision for a large LayerNorm on such a GPU, and what it warned of."""
    call = LayerNormCall(
        device=torch.device("cuda"),
        architecture=architecture,
        dtype=torch.bfloat16,
        tensor_type=torch.Tensor,
        needs_grad=False,
        situation=dispatch.Situation("eager", True, None, False, None),
        rows=1 << 20,
        columns=256,
        weight_dtype=torch.bfloat16,
        bias_dtype=torch.bfloat16,
        dims=1,
        wanted=(False,) * 3,
        out_dtype=torch.bfloat16,
        layouts=(Layout((1 << 20, 256), (256, 1), torch.bfloat16, 0), *[Layout((256,), (1,), torch.bfloat16, 0)] * 2),
        well_formed=True,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decision = LAYER_NORM._decide(call, None, prepare=True)
        LAYER_NORM._decide(call, None, prepare=True)  # the second call knows, and is quiet
    return decision, [str(one.message) for one in caught if "detr-fast" in str(one.message)]


def assert_eager_with_one_sentence(decision, messages, why):
    assert decision.implementation.name == "eager"
    assert why in decision.reasons["triton"]
    (message,) = messages
    assert message.startswith("detr-fast: layer_norm (1048576, 256) bfloat16 on ")
    assert "falls back from 'triton'" in message
    assert why in message


def test_on_a_healthy_machine_the_kernel_is_chosen(stub_gpu):
    decision, messages = decide()
    assert (decision.implementation.name, messages) == ("triton", [])
    assert len(stub_gpu.loaded) == 1


def test_a_cache_folder_that_cannot_be_written_means_eager(stub_gpu, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert_eager_with_one_sentence(*decide(), "Not a directory")


def test_a_full_disk_means_eager(stub_gpu, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.FileCacheManager, "put", full)
    assert_eager_with_one_sentence(*decide(), "No space left on device")


def test_a_driver_too_old_for_the_machine_code_means_eager(stub_gpu, monkeypatch):
    def refuse(*_):
        raise RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain.")

    monkeypatch.setattr(stub_gpu, "load_binary", refuse)
    assert_eager_with_one_sentence(*decide(), "unsupported toolchain")


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("sm_75", "sm_75 is older than sm_80"),
        ("sm_999", "sm_999 is newer than this detr-fast"),
        ("gfx1100", "gfx1100 is not among the AMD GPUs"),
    ],
)
def test_a_gpu_that_no_kernel_is_built_for_is_eager_without_an_attempt(architecture, why, stub_gpu):
    decision, messages = decide(architecture)
    assert (decision.implementation.name, messages, stub_gpu.loaded) == ("eager", [], [])
    assert why in decision.reasons["triton"]


def test_threads_that_compile_and_launch_at_once_all_get_their_results(stub_gpu):
    started, errors = threading.Barrier(4), []

    def work(columns):
        try:
            started.wait()
            x = torch.zeros(3, columns, dtype=torch.bfloat16)
            layer_norm.layer_norm_forward(x, None, None, 1e-5)
        except Exception as error:
            errors.append(error)

    run_all([threading.Thread(target=work, args=(columns,)) for columns in (64, 64, 128, 128)])
    assert errors == []
    assert sorted(arguments[8] for _, arguments in stub_gpu.launched) == [64, 64, 128, 128]


def test_threads_that_call_ops_and_change_backends_get_right_results():
    expected, errors = torch.nn.functional.layer_norm(torch.arange(32.0).view(2, 16), (16,)), []

    def work(number):
        for _ in range(50):
            with use_backend(layer_norm="eager" if number % 2 else "auto"):
                if not torch.equal(ops.layer_norm(torch.arange(32.0).view(2, 16), (16,)), expected):
                    errors.append(number)

    run_all([threading.Thread(target=work, args=(number,)) for number in range(4)])
    assert errors == []
    assert not dispatch._requests


def run_all(threads):
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


COMPILE = """
import hashlib
from detr_fast.kernels.catalog import entry
from detr_fast.kernels.offline import compile_variant
print(hashlib.sha256(compile_variant(entry("layer_norm_sum_partials_c256_bf16").variant, "sm_90")[0]).hexdigest())
"""


def test_processes_that_compile_into_one_cache_agree():
    processes = [
        subprocess.Popen([sys.executable, "-c", COMPILE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    found = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], found
    assert len({out for out, _ in found}) == 1


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, detr_fast
from detr_fast import nn, use_backend
norm, x = nn.LayerNorm(16), torch.randn(2, 16)
assert torch.equal(norm(x), torch.nn.functional.layer_norm(x, (16,), norm.weight, norm.bias))
with use_backend("triton"):
    try:
        norm(x)
    except detr_fast.dispatch.BackendError as error:
        print(error)
"""


def test_without_triton_everything_runs_eagerly_and_says_why_when_asked():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "triton is not installed" in run.stdout
    assert "install triton >= 3.6" in run.stdout
    assert len(run.stdout.splitlines()) == 1
