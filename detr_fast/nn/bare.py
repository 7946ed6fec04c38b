"""Whether a module may be computed other than by calling it: what every fused path asks first."""

from __future__ import annotations

from torch.nn import Module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_bare(part: Module) -> bool:
    """Whether its class's forward on the parameters that lie in it is all that a call of it does.

    Hooks, an instance's own forward, parametrisations and FSDP2 come between. Hooks on all modules of a process do not count:
    they are profilers', which are to see what runs without them.
    """
    altered = "forward" in part.__dict__ or "parametrizations" in part._modules
    return not (altered or has_hooks(part) or is_sharded(part))


def has_hooks(module: Module) -> bool:
    """Whether hooks of its own are to see its calls or their gradients."""
    return any(getattr(module, name) for name in HOOKS)


def is_sharded(module: Module) -> bool:
    """Whether FSDP2 has put a class of its own before the module's."""
    return type(module).__mro__[1].__name__ == "FSDPModule"
