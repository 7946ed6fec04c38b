"""Cases that Hypothesis generates for tests of ops and kernels: any dtype, size, magnitude and layout. Needs hypothesis.

    @generated(rows=sizes(70, tile=64), columns=sizes(300))
    def test_any_case_is_as_accurate_as_eager(values, rows, columns):
        x = values(rows, columns)

Cases are the same on every run: a test that fails by a rare draw would be blamed on the change at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Each keeps the shape; what is beside the elements must not be read.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "rows far apart": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "rows off 16 bytes": lambda x: torch.cat([x, x[..., :1]], -1)[..., : x.shape[-1]],
    "an address off 16 bytes": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[-x.numel() :].view(x.shape),
    "transposed": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    "one row for all": lambda x: x[..., :1, :].expand(x.shape),
}


@dataclass
class Values:
    """Makes a case's tensors, other numbers at each call: `values(rows, columns)`, or `values.parameter(columns)`."""

    dtype: torch.dtype
    scale: float
    offset: float
    layout: str
    seed: int
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, *shape: int) -> Tensor:
        """An input in the case's magnitude, dtype and layout."""
        x = torch.randn(shape, generator=self.generator) * self.scale + self.offset * self.scale
        return LAYOUTS[self.layout](x.to(self.dtype)) if x.numel() else x.to(self.dtype)

    def parameter(self, *shape: int, mean: float = 0.0) -> Tensor:
        """A parameter: of magnitude 1, contiguous."""
        return (torch.randn(shape, generator=self.generator) + mean).to(self.dtype)

    def flags(self, *shape: int, share: float) -> Tensor:
        """A mask of which about `share` is True."""
        return torch.rand(shape, generator=self.generator) < share


def values(
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    scales: tuple[float, ...] = (1e-2, 1.0, 1e3),
    offsets: tuple[float, ...] = (0.0, 1.0),
    layouts: tuple[str, ...] = tuple(LAYOUTS),
) -> st.SearchStrategy[Values]:
    return st.builds(
        Values,
        dtype=st.sampled_from(dtypes),
        scale=st.sampled_from(scales),
        offset=st.sampled_from(offsets),
        layout=st.sampled_from(layouts),
        seed=st.integers(0, 1 << 20),
    )


def sizes(most: int, tile: int = 0, least: int = 0) -> st.SearchStrategy[int]:
    """From `least` to `most`; one in two is none, one, or around a tile."""
    edges = [size for size in (0, 1, tile - 1, tile, tile + 1) if least <= size <= most]
    return st.one_of(st.sampled_from(edges), st.integers(least, most)) if edges else st.integers(least, most)


def generated(
    examples: int = 30, **arguments: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on cases drawn from the named arguments' strategies, and `values` (those of `values()` where not named)."""
    arguments.setdefault("values", values())

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        fixed = settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.explicit, Phase.generate),  # shrinking would take minutes of interpreted kernels
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        )
        return fixed(given(**arguments)(test))

    return decorate
