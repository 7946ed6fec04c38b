"""`from detr_fast import nn` instead of `from torch import nn`: the same names, faster.

LayerNorm, MultiheadAttention and the Transformer classes subclass their originals, so constructors, state_dicts, repr and
isinstance are torch's own. Every other name is torch.nn's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn as _torch_nn

from detr_fast.nn.multihead_attention import MultiheadAttention as MultiheadAttention
from detr_fast.nn.normalization import LayerNorm as LayerNorm
from detr_fast.nn.transformer import Transformer as Transformer
from detr_fast.nn.transformer import TransformerDecoder as TransformerDecoder
from detr_fast.nn.transformer import TransformerDecoderLayer as TransformerDecoderLayer
from detr_fast.nn.transformer import TransformerEncoder as TransformerEncoder
from detr_fast.nn.transformer import TransformerEncoderLayer as TransformerEncoderLayer

if TYPE_CHECKING:
    from torch.nn import *  # type: ignore[assignment]  # noqa: F403
else:
    __all__ = [name for name in dir(_torch_nn) if not name.startswith("_")]

    def __getattr__(name: str) -> Any:
        try:
            return getattr(_torch_nn, name)
        except AttributeError:
            raise AttributeError(f"neither detr_fast.nn nor torch.nn has {name!r}") from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
