"""Runs the machine program that Triton compiles for sm_80 (its PTX) on CPU tensors, thread by thread, and checks it.

    with emulated_gpu() as gpu:
        kernel[grid](x, y, n, BLOCK=64)  # any Triton kernel on CPU tensors; ops and modules of detr_fast by name, too

What the interpreter can't see is seen here: wrong code and layout conversions, vector accesses at unaligned addresses,
accesses outside tensors and shared memory, reads of shared memory that nothing wrote or whose asynchronous copy is under
way, and above all races and missing barriers, in shared and in global memory, in a program and between programs. Each
raises a `Fault` that names program, thread, instruction and source line.

sm_90's own instructions (wgmma, TMA, mbarrier) are not known: the same source, compiled for sm_80, is what runs. Threads run
in lockstep, so an error shows by its cause, never by chance; what depends on the hardware's order is not simulated.
Approximate instructions give the exact value, rounded. Needs triton, and TRITON_INTERPRET unset.
"""

from detr_fast.testing.ptx.driver import Emulation as Emulation
from detr_fast.testing.ptx.driver import emulated_gpu as emulated_gpu
from detr_fast.testing.ptx.faults import Deadlock as Deadlock
from detr_fast.testing.ptx.faults import Endless as Endless
from detr_fast.testing.ptx.faults import Fault as Fault
from detr_fast.testing.ptx.faults import MisalignedAccess as MisalignedAccess
from detr_fast.testing.ptx.faults import OutsideMemory as OutsideMemory
from detr_fast.testing.ptx.faults import Race as Race
from detr_fast.testing.ptx.faults import Uninitialised as Uninitialised
from detr_fast.testing.ptx.faults import Unsupported as Unsupported
