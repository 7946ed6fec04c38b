"""What a decoder starts from: the targets shifted by one, or queries that stand for nothing yet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("learned", "zeros", "random")


def shift_right(targets: Tensor, bos_idx: int) -> Tensor:
    """targets (N, L) -> (N, L): `bos_idx` first, then all but the last, so that position i sees only targets before i."""
    if targets.ndim != 2:
        raise ValueError(f"shift_right takes targets (N, L); got {tuple(targets.shape)}")
    return F.pad(targets, (1, 0), value=bos_idx)[:, : targets.shape[1]]


class DecoderQueries(nn.Module):
    """A fixed number of queries, which a decoder without causal mask fills all at once, as DETR's does.

    Args:
        count: Q, how many.
        d_model: C.
        kind: "learned", one vector each; "zeros", which differ by the positions added to them alone; or "random", drawn
            from N(0, 1) in every call.
    """

    def __init__(
        self,
        count: int,
        d_model: int,
        kind: str = "learned",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"got kind={kind!r}; expected one of {', '.join(KINDS)}")
        if count < 1:
            raise ValueError(f"got {count} queries; expected at least 1")
        self.count, self.d_model, self.kind = count, d_model, kind
        if kind == "learned":
            self.weight = nn.Parameter(torch.empty(count, d_model, device=device, dtype=dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.kind == "learned":
            nn.init.normal_(self.weight)

    def forward(self, memory: Tensor) -> Tensor:
        """memory (N, S, C), the encoder's output -> (N, Q, C), of its device and dtype."""
        shape = (memory.shape[0], self.count, self.d_model)
        if self.kind == "learned":
            return self.weight.to(memory.dtype).expand(shape)
        return memory.new_zeros(shape) if self.kind == "zeros" else memory.new_empty(shape).normal_()

    def extra_repr(self) -> str:
        return f"{self.count}, {self.d_model}, kind={self.kind!r}"
