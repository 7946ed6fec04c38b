"""A pytest plugin for processes that share a GPU: after each test the memory that is only kept is given back, and a process
in which CUDA is broken ends, so that pytest-xdist begins another: one kernel's error would be all later tests'.
"""

from __future__ import annotations

import os

import torch


def pytest_runtest_logfinish() -> None:
    """Called in the process that ran a test, once its result is told."""
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        os._exit(1)
