"""What the emulator raises: each is an AssertionError, so that a test that runs into one fails."""

from __future__ import annotations


class Fault(AssertionError):
    """A program did what a GPU would punish, at once or some day; the message names program, instruction and thread."""


class Unsupported(Fault):
    """The program holds an instruction, or a form of one, that the emulator does not know."""


class OutsideMemory(Fault):
    """An access outside all tensors of the launch, or outside the program's shared memory."""


class MisalignedAccess(Fault):
    """A vector access at an address that is no multiple of its size: a GPU ends the process."""


class Uninitialised(Fault):
    """A read of shared memory that nothing has written, or whose asynchronous copy has not been waited for."""


class Race(Fault):
    """Two threads touched the same memory, at least one writing, with no barrier between; or two programs did."""


class Deadlock(Fault):
    """Threads wait at barriers that the others never reach, or parts of a warp reach an instruction of the whole warp."""


class Endless(Fault):
    """A program ran more instructions than it was allowed."""
