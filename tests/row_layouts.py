"""How rows may lie in memory: each makes a tensor of the same values that lies so."""

from __future__ import annotations

import torch

ROW_LAYOUTS = {
    "rows far apart": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "transposed": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    "expanded": lambda x: x[..., :1, :].expand(x.shape),
    "rows off 16 bytes": lambda x: torch.cat([x, x[..., :1]], -1)[..., : x.shape[-1]],
    "an address off 16 bytes": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}
