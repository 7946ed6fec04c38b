"""A process of its own, with a fake libcuda: what Triton's own launcher asks of it for a launch, and what the C++ part does.

python -m tests.native.launch_both FOLDER [overlapping]: compiles the fake there, prints both, and how long each takes.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from detr_fast.kernels import driver
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver as runtime

from detr_fast import native
from detr_fast.ops.host_native import ADDRESS, OFFSET

TYPES = ("*bf16", "i64", None, "fp32", "i32", "*i64", "fp32", "i32", "*fp32", "i32")
ROUNDS = 2000


def fake_libcuda(folder: Path) -> ctypes.CDLL:
    made, source = folder / "libcuda.so.1", Path(__file__).with_name("fake_cuda.c")
    triton = Path(nvidia.__file__).parent
    text = "".join((triton / name).read_text() for name in ("driver.c", "driver.py"))  # triton 3.6's writes C
    asked = set(re.findall(r"\b(cu[A-Z]\w+)\(", text))
    rest = asked - set(re.findall(r"\b(cu[A-Z]\w+)\(", source.read_text()))
    (folder / "rest.c").write_text("".join(f"int {name}() {{ return 999; }}\n" for name in sorted(rest)))
    options = ["-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1", f"-I{triton / 'include'}"]
    subprocess.run(["gcc", *options, str(source), str(folder / "rest.c"), "-o", str(made)], check=True)
    knobs.nvidia.libcuda_path, knobs.cache.dir = str(folder), str(folder / "cache")
    fake = ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)  # under its name, which others open, too
    fake.fake_record.restype = ctypes.c_char_p
    return fake


def microseconds(call) -> float:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(ROUNDS):
            call()
        times.append((time.perf_counter() - start) / ROUNDS * 1e6)
    return min(times)


def main(folder: Path, overlapping: bool) -> None:
    fake = fake_libcuda(folder)
    sizes = [ctypes.sizeof(ctypes.c_void_p) if t[0] == "*" else {"i64": 8, "i32": 4, "fp32": 4}[t] for t in TYPES if t]
    sizes += [8, 8]
    fake.fake_parameters(len(sizes), (ctypes.c_size_t * len(sizes))(*sizes))
    runtime._active = SimpleNamespace(utils=nvidia.CudaUtils())
    names = [f"x{i}" for i in range(len(TYPES))]
    signature = {name: t or "constexpr" for name, t in zip(names, TYPES)} | {"BLOCK": "constexpr"}
    source = SimpleNamespace(signature=signature, constants={}, fn=SimpleNamespace(arg_names=[*names, "BLOCK"]))
    metadata = SimpleNamespace(
        num_ctas=1,
        num_warps=4,
        shared=5000,
        launch_cooperative_grid=False,
        launch_pdl=False,
        global_scratch_size=0,
        global_scratch_align=1,
        profile_scratch_size=0,
        profile_scratch_align=1,
        tensordesc_meta=None,
        target=SimpleNamespace(warp_size=32),
    )
    function = 0xF00D
    run = nvidia.CudaLauncher(source, metadata)
    x, y = torch.zeros(64), torch.zeros(32, dtype=torch.int64)
    values = (x.data_ptr() + 64, 1 << 40, None, 0.1, -3, y.data_ptr(), 1.0, 17 + 4, x.data_ptr(), 2**31 - 1)
    grid, stream = (5, 6, 7), 0x57

    def by_triton() -> None:
        run(*grid, stream, function, (4, 1, 5000), None, None, None, *values, 128)

    kernel = SimpleNamespace(run=run, metadata=metadata, function=function, asm={"ptx": driver.WAIT})
    driver.overlap(kernel, overlapping)
    by_triton()
    print("triton", fake.fake_record().decode())
    found = driver.entry(kernel, TYPES)
    assert found is not None, "a plain kernel, and the driver doesn't know how to launch it"
    given = {0: (ADDRESS, 0, 64), 5: (ADDRESS, 1, 0), 7: (OFFSET, 4, 0), 8: (ADDRESS, 0, 0)}
    fixed = found.parameters([0 if i in given else v for i, v in enumerate(values)])
    present = [i for i, t in enumerate(TYPES) if t]
    launch = (
        driver.functions(),
        (found.function, *grid, found.threads, found.shared, found.overlaps),
        fixed,
        tuple(map(present.index, given)),
        None,
    )
    host = native.load()

    def program(launches: int):
        one = ("launch", (*given.values(), launch), (), False, ())
        section = ((one,) * launches, (0, 1), (0,), 2)
        return host.Program(section, (), (), (0,), (), False, True, None, lambda device: stream, -1)

    program(1).run(17, None, x, y)
    print("driver", fake.fake_record().decode())
    fake.fake_quiet()
    some, more = program(1), program(11)
    ours = (microseconds(lambda: more.run(17, None, x, y)) - microseconds(lambda: some.run(17, None, x, y))) / 10
    print(f"µs Triton's launcher {microseconds(by_triton):.2f}, ours {ours:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["overlapping"])
