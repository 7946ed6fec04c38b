"""`from detr_fast import nn` instead of `from torch import nn`: the same names, faster.

LayerNorm, RMSNorm, MultiheadAttention, the Transformer classes and (where PyTorch has it) LinearCrossEntropyLoss subclass their
originals, so constructors, state_dicts, repr and isinstance are torch's own. What a transformer needs beside torch.nn's parts is here too:
embeddings, positions, decoder inputs and a head. Every other name is torch.nn's, modules such as `utils` and `functional` included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn as _torch_nn

from detr_fast.nn import forwarding
from detr_fast.nn.decoder_inputs import DecoderQueries as DecoderQueries
from detr_fast.nn.decoder_inputs import shift_right as shift_right
from detr_fast.nn.embedding import PatchEmbedding as PatchEmbedding
from detr_fast.nn.embedding import PixelEmbedding as PixelEmbedding
from detr_fast.nn.embedding import TokenEmbedding as TokenEmbedding
from detr_fast.nn.heads import LinearSoftmax as LinearSoftmax
from detr_fast.nn.multihead_attention import MultiheadAttention as MultiheadAttention
from detr_fast.nn.normalization import LayerNorm as LayerNorm
from detr_fast.nn.normalization import RMSNorm as RMSNorm
from detr_fast.nn.positional import LearnedPositionalEmbedding as LearnedPositionalEmbedding
from detr_fast.nn.positional import SinePositionEmbedding2D as SinePositionEmbedding2D
from detr_fast.nn.positional import SinusoidalPositionalEncoding as SinusoidalPositionalEncoding
from detr_fast.nn.transformer import Transformer as Transformer
from detr_fast.nn.transformer import TransformerDecoder as TransformerDecoder
from detr_fast.nn.transformer import TransformerDecoderLayer as TransformerDecoderLayer
from detr_fast.nn.transformer import TransformerEncoder as TransformerEncoder
from detr_fast.nn.transformer import TransformerEncoderLayer as TransformerEncoderLayer

forwarding.install()
if hasattr(_torch_nn, "LinearCrossEntropyLoss"):
    from detr_fast.nn.loss import LinearCrossEntropyLoss as LinearCrossEntropyLoss

if TYPE_CHECKING:
    from torch.nn import *  # type: ignore[assignment]  # noqa: F403
else:
    _ADDED = [name for name, value in globals().items() if getattr(value, "__module__", "").startswith(__name__)]
    __all__ = sorted({*_ADDED, *(name for name in dir(_torch_nn) if not name.startswith("_"))})

    def __getattr__(name: str) -> Any:
        try:
            return getattr(_torch_nn, name)
        except AttributeError:
            raise AttributeError(f"neither detr_fast.nn nor torch.nn has {name!r}") from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
