"""The host's work in C++: what PyTorch's own operations have, and a Python library has not.

`host.cpp` keeps what was decided and recorded for calls that are made again, and does it without Python. It is compiled on the
user's machine, against the torch that is installed there, in the background when the first kernel is called (half a minute of one core,
once for each torch; a C++ compiler is what Triton needs, too), and used from then on. Without it everything works, from Python.

DETR_FAST_NATIVE=0 leaves it out; DETR_FAST_NATIVE=1 waits for it when detr_fast is imported. `python -m detr_fast.native` compiles it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

try:
    import fcntl
except ImportError:  # on Windows, where nothing is compiled
    fcntl = None  # type: ignore[assignment]

SOURCE = Path(__file__).with_name("host.cpp")  # and the headers beside it
NAME = "_host"
TIMEOUT = 600  # seconds
host: ModuleType | None = None  # where it is in use
status = "not asked for: it is made when a kernel is called"  # in words
_switches: list[Callable[[ModuleType | None], None]] = []
_lock = threading.Lock()
_started = False


class CompilationError(RuntimeError):
    """host.cpp can't be compiled here; the message says why."""


def cache_folder() -> Path:
    """Where users' measurements and compiled code are kept: $DETR_FAST_CACHE, by default ~/.cache/detr-fast."""
    return Path(os.environ.get("DETR_FAST_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "detr-fast"))


def library() -> Path:
    """Where the compiled module for this source, torch and Python is, or will be."""
    sources = [path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    told = (sources, torch.__version__, torch.version.git_version, sysconfig.get_config_var("SOABI"))
    tag = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
    return cache_folder() / f"{NAME}-{tag}.so"


def command(output: Path) -> list[str]:
    """What compiles it. Raises CompilationError where there is no compiler."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if os.name != "posix" or sys.platform == "darwin" or compiler is None:
        raise CompilationError("there is no C++ compiler on PATH: install g++, or set CXX")
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    paths = [f"-I{p}" for p in (include, include / "torch" / "csrc" / "api" / "include", sysconfig.get_path("include"))]
    links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"]
    options = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w"]
    return [*compiler.split(), *options, *paths, str(SOURCE), "-o", str(output), *links]


def compile() -> Path:
    """Compile the module, unless that was done before, and return its path. Raises CompilationError."""
    path = library()
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        if path.exists():  # by another process, meanwhile
            return path
        output = Path(folder) / path.name
        quietly = ["nice", "-n", "10"] if shutil.which("nice") else []
        try:
            done = subprocess.run(
                [*quietly, *command(output)], capture_output=True, text=True, errors="replace", timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            raise CompilationError(f"the compiler took more than {TIMEOUT} s") from None
        if done.returncode != 0:
            told = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-3:]
            raise CompilationError("the compiler failed: " + "; ".join(told[:3]))
        os.replace(output, path)
    return path


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside the block no other process of this machine's is in one for the same path."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@cache
def load() -> ModuleType:
    """The compiled module, which is compiled first where it was not. Raises CompilationError."""
    path = compile()
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise CompilationError(f"{path} can't be loaded: {error}") from None
    return module


def on_switch(switch: Callable[[ModuleType | None], None]) -> None:
    """Call `switch` with the module when it comes into use, and with None when it is left out again."""
    _switches.append(switch)
    if host is not None:
        switch(host)


def use(module: ModuleType | None) -> None:
    """Let the ops use the module, or none."""
    global host, status
    with _lock:
        host = module
        if module is not None:
            status = "in use"
        for switch in _switches:
            switch(module)


def wanted() -> None:
    """A GPU's tensors are here: have the module made, in the background, and used once it is there."""
    global _started, status
    if _started:
        return
    _started = True
    if os.environ.get("DETR_FAST_NATIVE") == "0":
        status = "left out: DETR_FAST_NATIVE=0"
        return
    status = "being compiled"
    threading.Thread(target=_make, name="detr-fast-native", daemon=True).start()


def make() -> None:
    """Have the module made and used before this returns; where that can't be, `status` says why."""
    global _started
    if host is None and os.environ.get("DETR_FAST_NATIVE") != "0":
        _started = True
        _make()


def _make() -> None:
    global status
    try:
        use(load())
    except (CompilationError, OSError) as error:
        status = f"left out: {error}"
        warnings.warn(
            f"detr-fast: the host's part of its ops runs in Python, which takes two to three times as long: {error}. "
            "DETR_FAST_NATIVE=0 leaves it at that.",
            RuntimeWarning,
            stacklevel=2,
        )


def read_environment() -> None:
    """Apply DETR_FAST_NATIVE=1. Called once all ops are known. Raises CompilationError."""
    global _started
    if os.environ.get("DETR_FAST_NATIVE") == "1":
        _started = True
        use(load())
