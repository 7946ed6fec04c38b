"""A dispatch mode that writes down what it sees."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Seen(TorchDispatchMode):
    """names: of the operations that ran under it, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))
