"""The host's work in C++: what PyTorch's own operations have, and a Python library has not.

`host.cpp` keeps what was decided and recorded for calls that are made again, and does it without Python. It is compiled on the
user's machine, against the torch that is installed there, in the background when the first tensor on a GPU meets an op (half a minute of one core,
once for each torch; a C++ compiler is what Triton needs, too), and used from then on. Without it everything works, from Python.

DETR_FAST_NATIVE=0 leaves it out; DETR_FAST_NATIVE=1 waits for it when detr_fast is imported. `python -m detr_fast.native` compiles it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # on Windows, where nothing is compiled
    fcntl = None  # type: ignore[assignment]

SOURCE = Path(__file__).with_name("host.cpp")  # and the headers beside it
NAME = "_host"
TIMEOUT = 600  # seconds
host: ModuleType | None = None  # where it is in use
status = "not asked for: it is made when a tensor on a GPU meets an op"  # in words
_switches: list[Callable[[ModuleType | None], None]] = []
_lock = threading.Lock()
_started = False
_wrong = False


class CompilationError(RuntimeError):
    """host.cpp can't be compiled here; the message says why."""


def cache_folder() -> Path:
    """Where users' measurements and compiled code are kept: $DETR_FAST_CACHE, by default ~/.cache/detr-fast."""
    if told := os.environ.get("DETR_FAST_CACHE"):
        return Path(told)
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        return Path(home, ".cache", "detr-fast")
    return Path(tempfile.gettempdir(), f"detr-fast-{os.getuid()}")  # a user without a home, as in some containers


def library() -> Path:
    """Where the compiled module for this source, torch and Python is, or will be."""
    sources = [path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    told = sources, torch.__version__, torch.version.git_version, sysconfig.get_config_var("SOABI")
    here = platform.libc_ver()  # containers with the same home may have other libraries
    tag = hashlib.sha256(repr((told, here)).encode()).hexdigest()[:16]
    return cache_folder() / f"{NAME}-{tag}.so"


def command(output: Path) -> list[str]:
    """What compiles it. Raises CompilationError where there is no compiler."""
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    compiler = shlex.split(os.environ.get("CXX", "")) or ([found] if found else [])
    if not compiler:
        raise CompilationError("there is no C++ compiler on PATH: install g++, or set CXX")
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    paths = [f"-I{p}" for p in (include, include / "torch" / "csrc" / "api" / "include", sysconfig.get_path("include"))]
    links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"]
    options = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w"]
    return [*compiler, *options, *paths, str(SOURCE), "-o", str(output), *links]


def compile() -> Path:
    """Compile the module, unless that was done before, and return its path. Raises CompilationError."""
    if fcntl is None or sys.platform == "darwin":
        raise CompilationError("it is for Linux alone")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):  # to load it would bring the GIL back, for all that runs here
        raise CompilationError("the GIL guards its tables, and this Python is built without one")
    path = library()
    if path.exists():
        return path
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            if not path.exists():  # made by another process, meanwhile
                _compile(Path(folder) / path.name)
                os.replace(Path(folder) / path.name, path)
    except OSError as error:
        raise CompilationError(
            f"{path.parent} can't be written: {error}; set DETR_FAST_CACHE to a folder that can"
        ) from None
    return path


def _compile(output: Path) -> None:
    quietly = ["nice", "-n", "10"] if shutil.which("nice") else []
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    compiler = subprocess.Popen([*quietly, *command(output)], start_new_session=True, **pipes)
    try:
        said = compiler.communicate(timeout=TIMEOUT)[1].splitlines()
    except BaseException as error:
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(compiler.pid, signal.SIGKILL)  # with those that it has started
        compiler.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise CompilationError(f"the compiler took more than {TIMEOUT} s") from None
        raise
    if compiler.returncode != 0:
        told = [line for line in said if "error" in line] or said[-3:]
        raise CompilationError("the compiler failed: " + "; ".join(told[:3]))
    os.chmod(output, 0o755)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside the block no other process of this machine's is in one for the same path. Raises CompilationError after TIMEOUT."""
    end = time.monotonic() + TIMEOUT
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise CompilationError(f"another process has held {path} for {TIMEOUT} s") from None
                time.sleep(0.2)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # processes that were forked meanwhile have it open, too


def _check_owner(path: Path) -> None:
    """Raise CompilationError where somebody else may have put the file there."""
    for one, others in ((path, 0o022), (path.parent, 0o002)):
        found = one.stat()
        if found.st_uid not in (os.getuid(), 0) or found.st_mode & others:
            raise CompilationError(
                f"{one} belongs to, or can be written by, another user: set DETR_FAST_CACHE to a folder of yours alone"
            )


@cache
def load() -> ModuleType:
    """The compiled module, which is compiled first where it was not. Raises CompilationError."""
    path = compile()
    _check_owner(path)
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


def leave_out(reason: str) -> None:
    """Use the module no more in this process, as what it gave was wrong (see `ops.host_check`)."""
    global status, _wrong
    _wrong = True
    use(None)
    status = f"left out: {reason}"


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
    threading.Thread(target=_make, args=(bool(sys.executable),), name="detr-fast-native", daemon=True).start()


def make() -> None:
    """Have the module made and used before this returns; where that can't be, `status` says why."""
    global _started
    if host is None and not _wrong and os.environ.get("DETR_FAST_NATIVE") != "0":
        _started = True
        _make()


def _make(in_child: bool = False) -> None:
    global status
    try:
        if in_child and not library().exists():
            _compile_in_child()
        use(load())
    except (CompilationError, OSError) as error:
        status = f"left out: {error}"
        warnings.warn(
            f"detr-fast: the host's part of its ops runs in Python, which takes two to three times as long: {error}. "
            "DETR_FAST_NATIVE=0 leaves it at that.",
            RuntimeWarning,
            stacklevel=2,
        )


def _compile_in_child() -> None:
    """`python -m detr_fast.native` as a process that outlives this one: programs that are soon done leave a module behind, too."""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "DETR_FAST_NATIVE": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
    }
    with tempfile.TemporaryFile("w+") as told:
        child = subprocess.Popen(
            [sys.executable, "-m", "detr_fast.native"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=told,
            env=environment,
            start_new_session=True,
        )
        if child.wait() != 0:
            told.seek(0)
            raise CompilationError((told.read().strip().splitlines() or ["no message"])[-1])


def read_environment() -> None:
    """Apply DETR_FAST_NATIVE=1. Called once all ops are known. Raises CompilationError."""
    global _started
    if os.environ.get("DETR_FAST_NATIVE") == "1":
        _started = True
        try:
            use(load())
        except CompilationError as error:
            raise CompilationError(
                f"DETR_FAST_NATIVE=1 asks for the host's part in C++, but {error}. Unset it to run from Python."
            ) from None
