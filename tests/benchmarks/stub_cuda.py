"""Runs benchmarks/kernel_calls.py where there is no GPU: meta tensors, and stubs for what it asks of CUDA's driver.

python tests/benchmarks/stub_cuda.py benchmarks/kernel_calls.py graphs
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys

import torch


class Graph:
    def replay(self) -> None:
        pass


def load(path, name="kernel_calls"):
    """The script as a module, on meta tensors."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DEVICE = torch.device("meta")
    return module


if __name__ == "__main__":
    torch.cuda.synchronize = lambda: None
    torch.cuda.set_sync_debug_mode = lambda mode: None
    torch.cuda.CUDAGraph = Graph
    torch.cuda.graph = lambda graph: contextlib.nullcontext()
    sys.exit(load(sys.argv[1]).main(sys.argv[2:]))
