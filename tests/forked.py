"""Processes that tests fork."""

from __future__ import annotations

import os
import signal
import time


def status_of(child: int, seconds: float = 60.0) -> int | None:
    """The exit status of a forked process; None where it was still running after so many seconds, and was killed."""
    for _ in range(int(seconds * 10)):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
