from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from detr_fast import native
from detr_fast.ops import boundary


@pytest.fixture
def unstarted(monkeypatch, tmp_path):
    """As when detr_fast was imported: nothing is compiled, and nobody has asked for it."""
    before = native.host
    native.use(None)
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("DETR_FAST_NATIVE", raising=False)
    monkeypatch.setattr(native, "_started", False)
    monkeypatch.setattr(native, "status", "")
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    yield tmp_path
    native.use(before)


def compiler(folder, monkeypatch, script):
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def test_the_first_call_on_a_gpu_has_it_made_and_used(host, unstarted, monkeypatch):
    native.use(None)
    monkeypatch.setattr(native, "_compile_in_child", lambda: None)
    monkeypatch.setattr(native, "load", lambda: host)
    native.wanted()
    for thread in [one for one in threading.enumerate() if one.name == "detr-fast-native"]:
        thread.join()
    assert native.host is host
    assert native.status == "in use"
    assert all(op.native is not None for op in boundary.ops)


def test_a_compiler_that_fails_is_told_once_and_everything_runs_from_python(unstarted, monkeypatch):
    compiler(unstarted, monkeypatch, "echo 'host.cpp:1: error: no such thing' >&2; exit 1")
    with pytest.warns(RuntimeWarning, match="no such thing.*DETR_FAST_NATIVE=0"):
        native._make()
    assert native.status.startswith("left out: the compiler failed")
    monkeypatch.setattr(native, "_started", True)
    native.wanted()
    assert native.host is None
    assert not list(unstarted.glob("*.so"))


def test_a_compiler_that_takes_too_long_leaves_no_process_behind(unstarted, monkeypatch):
    compiler(unstarted, monkeypatch, f"(sleep 2; touch {unstarted / 'survived'}) & wait")
    monkeypatch.setattr(native, "TIMEOUT", 0.5)
    with pytest.raises(native.CompilationError, match=r"took more than 0\.5 s"):
        native.compile()
    time.sleep(2)
    assert not (unstarted / "survived").exists()


def test_who_ends_the_process_that_compiles_ends_the_compiler(unstarted, monkeypatch):
    begun, survived = unstarted / "begun", unstarted / "survived"
    compiler(unstarted, monkeypatch, f"(touch {begun}; sleep 2; touch {survived}) & wait")
    process = subprocess.Popen([sys.executable, "-m", "detr_fast.native"], stderr=subprocess.DEVNULL)
    for _ in range(600):
        if begun.exists():
            break
        time.sleep(0.1)
    process.terminate()
    process.wait(30)
    assert begun.exists()
    time.sleep(2)
    assert not survived.exists()


def test_without_a_compiler_the_remedy_is_named(unstarted, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(native.CompilationError, match="install g\\+\\+, or set CXX"):
        native.compile()


def test_what_was_compiled_is_found_again_and_not_made_for_another_torch_or_c_library(unstarted, monkeypatch):
    compiler(
        unstarted, monkeypatch, 'while [ "$1" != "-o" ]; do shift; done; touch "$2"; echo >> ' + str(unstarted / "runs")
    )
    assert native.compile() == native.compile()
    assert (unstarted / "runs").read_text() == "\n"
    monkeypatch.setattr(torch, "__version__", "2.99")
    native.compile()
    assert (unstarted / "runs").read_text() == "\n\n"
    monkeypatch.setattr(native.platform, "libc_ver", lambda: ("glibc", "2.99"))
    native.compile()
    assert (unstarted / "runs").read_text() == "\n\n\n"


def test_what_can_not_be_loaded_is_left_out(unstarted, monkeypatch):
    compiler(unstarted, monkeypatch, 'while [ "$1" != "-o" ]; do shift; done; echo nonsense > "$2"')
    with pytest.raises(native.CompilationError, match="can't be loaded"):
        native.load()


def test_a_process_forked_meanwhile_keeps_no_lock(unstarted):
    path = unstarted / "lock"
    with native._alone(path):
        child = subprocess.Popen(["sleep", "20"], close_fds=False)
    try:
        subprocess.run(["flock", str(path), "true"], timeout=5, check=True)
    finally:
        child.kill()


def test_a_module_that_somebody_else_may_have_put_there_is_not_loaded(host, unstarted):
    path = native.library()
    path.write_bytes(b"")
    path.chmod(0o666)
    with pytest.raises(native.CompilationError, match="can be written by, another user"):
        native.load()


def test_a_folder_that_can_not_be_written_is_named(unstarted, monkeypatch):
    (unstarted / "file").touch()
    monkeypatch.setenv("DETR_FAST_CACHE", str(unstarted / "file" / "below"))
    with pytest.raises(native.CompilationError, match=r"can't be written.*set DETR_FAST_CACHE"):
        native.compile()


def test_where_there_is_no_linux_nothing_is_compiled(unstarted, monkeypatch):
    monkeypatch.setattr(native, "fcntl", None)
    with pytest.raises(native.CompilationError, match="for Linux alone"):
        native.compile()


def test_a_python_without_the_gil_keeps_doing_without(unstarted, monkeypatch):
    real = native.sysconfig.get_config_var
    monkeypatch.setattr(native.sysconfig, "get_config_var", lambda name: name == "Py_GIL_DISABLED" or real(name))
    with pytest.raises(native.CompilationError, match="built without one"):
        native.load()


def test_the_process_that_compiles_outlives_the_one_that_asked_and_says_what_failed(unstarted, monkeypatch):
    compiler(unstarted, monkeypatch, "echo 'error: no such thing' >&2; exit 1")
    with pytest.raises(native.CompilationError, match="the compiler failed: error: no such thing"):
        native._compile_in_child()
    done = unstarted / "done"
    compiler(unstarted, monkeypatch, f'sleep 3; while [ "$1" != "-o" ]; do shift; done; touch "$2" {done}')
    code = "import time; from detr_fast import native; native.wanted(); time.sleep(1)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for _ in range(600):
        if done.exists():
            break
        time.sleep(0.1)
    assert done.exists()


def test_asked_for_by_the_environment_it_fails_with_the_remedy(unstarted, monkeypatch):
    monkeypatch.setenv("DETR_FAST_NATIVE", "1")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(native.CompilationError, match=r"/no/such/compiler.*Unset it to run from Python"):
        native.read_environment()


def test_it_can_be_left_out(unstarted, monkeypatch):
    monkeypatch.setenv("DETR_FAST_NATIVE", "0")
    native.wanted()
    assert native.status == "left out: DETR_FAST_NATIVE=0"
    native.wanted()
    assert native.host is None


def test_asked_for_by_the_environment_it_is_in_use_from_the_start(host):
    code = (
        "from detr_fast import native, ops; print(native.status); from detr_fast import nn, models; "
        "from detr_fast.ops import boundary; assert all(op.native is not None for op in boundary.ops)"
    )
    environment = {**os.environ, "DETR_FAST_NATIVE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "in use"
