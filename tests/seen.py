"""What ran: dispatch modes that write down what they see or answer for what has no values, and the nodes of a graph."""

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


class AnswersYes(TorchDispatchMode):
    """Fake tensors have no values: a look at one sees 1, or True."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or (1.0 if args[0].is_floating_point() else 1)
        return func(*args, **(kwargs or {}))


class Copies(TorchDispatchMode):
    """Writes down whether copies are allowed not to block."""

    def __init__(self):
        super().__init__()
        self.blocking = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            self.blocking.append(not kwargs.get("non_blocking", False))
        elif func is torch.ops.aten.copy_.default:
            self.blocking.append(not (len(args) > 2 and args[2]))
        return func(*args, **kwargs)


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
