"""What ran: a dispatch mode that writes down what it sees, and the nodes of a graph."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Seen(TorchDispatchMode):
    """names: of the operations that ran under it, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def nodes(y):
    """Names of the nodes that gave y."""
    found, ahead = set(), [y.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None:
            python = isinstance(node, torch._C._FunctionBase)  # torch 2.11 asks none of these for its name
            found.add(type(node).__name__ if python else node.name())
            ahead += [one for one, _ in node.next_functions]
    return found
