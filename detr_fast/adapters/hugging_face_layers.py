"""Hugging Face transformers' layers, known by the names and the order in which their code reads them.

The residual sum with its dropout and norm is one op, and so is a post-norm feed-forward block with those behind it. DETR's
encoder layer in training, too, asks the device whether all is finite, and the host waits: here it does not.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.compiler import assume_constant_result
from torch.nn import Module

from detr_fast.adapters import hugging_face_alibi as alibi
from detr_fast.adapters import hugging_face_backbones as backbones
from detr_fast.adapters import hugging_face_bart as bart
from detr_fast.adapters import hugging_face_biased as biased
from detr_fast.adapters import hugging_face_deformable as deformable
from detr_fast.adapters import hugging_face_gpt as gpt
from detr_fast.adapters import hugging_face_grounding as grounding
from detr_fast.adapters import hugging_face_hiera as hiera
from detr_fast.adapters import hugging_face_masked as masked
from detr_fast.adapters import hugging_face_others as others
from detr_fast.adapters import hugging_face_relative as relative
from detr_fast.adapters import hugging_face_weighing as weighing
from detr_fast.adapters.base import (
    Adapter,
    Scriptable,
    fingerprint,
    joined,
    joined_of,
    kind_of,
    reads,
    why_not_fuse,
    why_not_switch,
)
from detr_fast.adapters.blocks import (
    activation_name,
    comes_apart,
    feed_forward_add_norm,
    feed_forward_sum,
    is_dispatched,
    is_norm,
    is_plain,
    linear_add_norm,
)
from detr_fast.adapters.hugging_face import padding_of, with_padding
from detr_fast.adapters.hugging_face_attention import attend_add_norm
from detr_fast.adapters.hugging_face_blocks import block_add_norm, decode, decoder_comes_apart, finite
from detr_fast.adapters.hugging_face_contents import detr_layer
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import FeedForwardParts, probability, sum_and_norm
from detr_fast.nn.whole_layer import whole
from detr_fast.ops.dropout import shared_seed
from detr_fast.ops.layers import DECODER_LAYER, ENCODER_LAYER


class BertOutput(Scriptable):
    """BertOutput and BertSelfOutput, and those of the models that copied them: norm(input + dropout(dense(x)))."""

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if not comes_apart(hidden_states, self.dense, self.dropout, self.LayerNorm):
            return super().forward(hidden_states, input_tensor)  # type: ignore[misc]
        p = probability(self.dropout, self.training)
        return linear_add_norm(hidden_states, self.dense, input_tensor, self.LayerNorm, p)


class BertLayer(Scriptable):
    """BertLayer's feed-forward block, which is two modules: BertIntermediate and BertOutput."""

    def feed_forward_chunk(self: Any, attention_output: Tensor) -> Tensor:
        first, last = self.intermediate, self.output
        activation = _bert_activation(first, last) if is_dispatched(attention_output) else None
        if activation is None or not comes_apart(
            attention_output, first.dense, last.dense, last.dropout, last.LayerNorm
        ):
            return super().feed_forward_chunk(attention_output)  # type: ignore[misc]
        p = probability(last.dropout, last.training)
        parts = FeedForwardParts(first.dense, activation, 0.0, last.dense, p)
        return feed_forward_add_norm(attention_output, parts, last.LayerNorm)


class DetrEncoderLayer(Scriptable):
    """The encoder layer of DETR, Conditional DETR and RT-DETR, and of the models that copied them."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        spatial_position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        before = getattr(self, "normalize_before", False)  # RT-DETR's, where it is asked for
        if before or not comes_apart(hidden_states, self.self_attn_layer_norm, self.final_layer_norm):
            return super().forward(hidden_states, attention_mask, spatial_position_embeddings, **kwargs)  # type: ignore[misc]
        tensors = (hidden_states, attention_mask, padding_of(attention_mask), spatial_position_embeddings)
        with shared_seed():
            if kwargs:
                return self._fused(*tensors, **kwargs)
            return whole(ENCODER_LAYER, self, self._fused, tensors, describe=detr_layer)

    def _fused(self: Any, x: Tensor, mask: Any, padding: Any, position: Any, **kwargs: Any) -> Tensor:
        own = {"attention_mask": with_padding(mask, padding), "position_embeddings": position, **kwargs}
        p = probability(self.dropout, self.training)
        y = attend_add_norm(self.self_attn, self.self_attn_layer_norm, p, x, own)
        return finite(self, block_add_norm(self.mlp, y, self.final_layer_norm))


class DetrDecoderLayer(Scriptable):
    """DETR's decoder layer."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        object_queries_position_embeddings: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        positions = (spatial_position_embeddings, object_queries_position_embeddings)
        if not decoder_comes_apart(self, hidden_states):
            masks = (encoder_hidden_states, encoder_attention_mask)
            return super().forward(hidden_states, attention_mask, *positions, *masks, **kwargs)  # type: ignore[misc]
        memory = (encoder_hidden_states, encoder_attention_mask, padding_of(encoder_attention_mask))
        tensors = (hidden_states, attention_mask, padding_of(attention_mask), *positions, *memory)
        with shared_seed():
            if kwargs:
                return self._fused(*tensors, **kwargs)
            return whole(DECODER_LAYER, self, self._fused, tensors, describe=detr_layer)

    def _fused(
        self: Any,
        x: Tensor,
        mask: Any,
        padding: Any,
        position: Any,
        query_position: Any,
        memory: Any,
        memory_mask: Any,
        memory_padding: Any,
        **kwargs: Any,
    ) -> Tensor:
        own = {"attention_mask": with_padding(mask, padding), "position_embeddings": query_position, **kwargs}
        cross = {
            "key_value_states": memory,
            "attention_mask": with_padding(memory_mask, memory_padding),
            "position_embeddings": query_position,
            "encoder_position_embeddings": position,
            **kwargs,
        }
        return decode(self, x, own, None if memory is None else cross)


class ConditionalDetrDecoderLayer(Scriptable):
    """Conditional DETR's decoder layer."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        query_position_embeddings: Tensor | None = None,
        query_sine_embed: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        is_first: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        positions = (spatial_position_embeddings, query_position_embeddings, query_sine_embed)
        if not decoder_comes_apart(self, hidden_states):
            rest = (encoder_hidden_states, encoder_attention_mask, is_first)
            return super().forward(hidden_states, attention_mask, *positions, *rest, **kwargs)  # type: ignore[misc]
        own = {"attention_mask": attention_mask, "query_position_embeddings": positions[1], **kwargs}
        cross = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": encoder_attention_mask,
            "query_sine_embed": query_sine_embed,
            "encoder_position_embeddings": spatial_position_embeddings,
            "query_position_embeddings": query_position_embeddings if is_first else None,
            **kwargs,
        }
        with shared_seed():
            return decode(self, hidden_states, own, None if encoder_hidden_states is None else cross)


class ViTLayer(Scriptable):
    """ViT's layer, which normalises first."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if not comes_apart(hidden_states, self.layernorm_after, self.dropout):
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        with shared_seed():
            y = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)[0]
            p = probability(self.dropout, self.training)
            x, y = sum_and_norm(y, hidden_states, self.layernorm_after, p)
            return x + self.dropout(self.mlp(y))


class CLIPLayer(Scriptable):
    """CLIP's layer, which normalises first and drops nothing, and its many copies."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        if not comes_apart(hidden_states, self.layer_norm2):
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        with shared_seed():
            y = self.layer_norm1(hidden_states)
            y = self.self_attn(hidden_states=y, attention_mask=attention_mask, **kwargs)[0]
            x, y = sum_and_norm(y, hidden_states, self.layer_norm2)
            return x + self.mlp(y)


class YolosLayer(Scriptable):
    """The layer of YOLOS, DPT and VideoMAE, which normalises first; its feed-forward block is two modules."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not comes_apart(hidden_states, self.layernorm_after):
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        with shared_seed():
            y = self.attention(self.layernorm_before(hidden_states), **kwargs)
            x, y = sum_and_norm(y, hidden_states, self.layernorm_after)
            parts = _two_modules(self.intermediate, self.output)
            return self.output(self.intermediate(y), x) if parts is None else feed_forward_sum(y, parts, x)


def _bert_activation(first: Any, last: Any) -> str | None:
    """What lies between the linear layers of BertIntermediate and BertOutput; None where they are to be called."""
    if not (
        isinstance(last, BertOutput) and is_bare(last) and is_bare(first) and _is_intermediate(type(first).forward)
    ):
        return None
    return activation_name(first.intermediate_act_fn)


def _two_modules(first: Any, last: Any) -> FeedForwardParts | None:
    """The block that YOLOS's two modules are, of which the second adds its other input; None where they are to be called."""
    known = is_bare(first) and is_bare(last) and _is_intermediate(type(first).forward) and _adds(type(last).forward)
    activation = activation_name(first.intermediate_act_fn) if known else None
    if activation is None or not all(map(is_plain, (first.dense, last.dense, last.dropout))):
        return None
    return FeedForwardParts(first.dense, activation, 0.0, last.dense, probability(last.dropout))


@assume_constant_result
def _adds(forward: Any) -> bool:
    return _reads_as_output(forward)


@cache
def _reads_as_output(forward: Any) -> bool:
    return fingerprint(forward) == "c23f37f486bc81ec"


@assume_constant_result  # Dynamo would warn of the cache, and trace what is behind it
def _is_intermediate(forward: Any) -> bool:
    return _reads_as_intermediate(forward)


@cache
def _reads_as_intermediate(forward: Any) -> bool:
    return reads(forward) == ("self hidden_states", "dense intermediate_act_fn")


_ENCODER = "self_attn nn functional dropout training self_attn_layer_norm mlp final_layer_norm torch isfinite all finfo dtype max clamp"
_DECODER = "self_attn nn functional dropout training self_attn_layer_norm encoder_attn encoder_attn_layer_norm mlp final_layer_norm"
_SPATIAL = "self hidden_states attention_mask spatial_position_embeddings"
# By the arguments of a forward and what it reads: our class. BertLayer is known by its feed_forward_chunk.
_FORWARDS: dict[tuple[str, str], type[Module]] = {
    ("self hidden_states input_tensor", "dense dropout LayerNorm"): BertOutput,
    (_SPATIAL, _ENCODER): DetrEncoderLayer,
    (
        _SPATIAL,
        "normalize_before self_attn_layer_norm self_attn nn functional dropout training final_layer_norm mlp "
        "torch isfinite all finfo dtype max clamp",
    ): DetrEncoderLayer,
    (
        f"{_SPATIAL} object_queries_position_embeddings encoder_hidden_states encoder_attention_mask",
        _DECODER,
    ): DetrDecoderLayer,
    (
        f"{_SPATIAL} query_position_embeddings query_sine_embed encoder_hidden_states encoder_attention_mask is_first",
        _DECODER,
    ): ConditionalDetrDecoderLayer,
    (
        "self hidden_states attention_mask",
        "layernorm_before attention dropout layernorm_after mlp",
    ): ViTLayer,
}
# By the fingerprint of their forward, where layers that read the same differ in what they give their attentions.
_CODE: dict[str, type[Module]] = {
    "dd4bc88d4660ab80": CLIPLayer,
    "b848d305993786c4": CLIPLayer,  # the same, written otherwise
    "32b1fc0bc1074b80": YolosLayer,
    "9fd96d42e17718c0": bart.BartEncoderLayer,
    "3961d117bf89f69c": bart.MBartEncoderLayer,
    "b6d4da1ec6ec5a49": bart.BartDecoderLayer,
    "9bb4b405c16addab": bart.MBartDecoderLayer,
    "ffdc60d9d45a4be3": bart.WhisperDecoderLayer,
    "df6d9f6c00890bc5": others.Wav2Vec2Layer,
    "7eec59dfaf329172": others.Wav2Vec2StableLayer,
    "e39953f8878ed779": others.BlipLayer,
    "50cf7113ad791a59": others.Dinov2Layer,
    "393c6687d98e38a7": others.GPT2Block,
    "493d672e0cae2daa": gpt.OPTDecoderLayer,
    "21549d3ba684e4f4": gpt.OPTDecoderLayer,  # BioGPT's
    "cbf326aba3f4aa19": gpt.GPTNeoBlock,
    "0b46d63db235bb60": gpt.GPTNeoSelfAttention,
    "fd18523acb579d31": gpt.GPTJAttention,
    "2a5769c22b66b9d0": alibi.BloomBlock,
    "ba9d830818e53ae2": alibi.MptBlock,
    "a68daa09164a6f07": others.DistilBertLayer,
    "84dac4fc13a20256": others.SamTwoWayBlock,
    "af7d325842f6ce8d": weighing.DabDetrEncoderAttention,
    "5178a8bf129c9457": weighing.DabDetrAttention,
    "d4b88ef31ee8a3dc": weighing.DabDetrSelfAttention,
    "db2268f47b161154": weighing.DabDetrFeedForward,
    "6c729d86f05cb62a": weighing.DabDetrEncoderLayer,
    "7de50f447265321b": weighing.GroundingDinoAttention,
    "ff89f20391901c6f": weighing.Mask2FormerAttention,
    "5ea513003bcebe5c": weighing.GroundingDinoDecoderLayer,
    "4de406d1e6457a2a": grounding.GroundingDinoEncoder,
    "dc302c5c1f94b7c1": grounding.GroundingDinoEncoder,  # MM Grounding DINO's, which returns a class of its own
    "1d3a9998199d6d1a": grounding.GroundingDinoEncoderLayer,
    "c15c566ad96da74e": grounding.GroundingDinoFusionLayer,
    "d8c10797b8fa035d": grounding.GroundingDinoBiAttention,
    "513ee9324b3b9b12": grounding.GroundingDinoTextEnhancerLayer,
    "5970ae90e37cac20": grounding.OmDetTurboEncoderLayer,
    "1653b3d074186294": grounding.OmDetTurboDecoderLayer,
    "104f2f1bc583f51e": biased.SwinLayer,
    "03e21f085b34c529": biased.DonutSwinLayer,
    "2a79556950c3c0f1": biased.MaskFormerSwinLayer,
    "e9a56d647782a12b": biased.SwinSelfAttention,
    "d35266712074e644": biased.Swinv2SelfAttention,
    "c6ab87410a46552f": biased.MPNetSelfAttention,
    "56abf6a4d8cc29cb": biased.MPNetAttention,
    "5c2f352653fd39c5": biased.Data2VecVisionSelfAttention,
    "9278631b8dca2c19": deformable.DeformableDetrEncoderLayer,
    "6ee73d4b111d5079": deformable.DeformableDetrDecoderLayer,
    "6e62030a3f3af3d1": deformable.RTDetrDecoderLayer,
    "561240bc571145b2": deformable.DFineDecoderLayer,
    "5e9d6aeaca445957": deformable.DFineGate,
    "bd39da64d9d088bf": deformable.LwDetrDecoderLayer,
    "70e9ff27ea699a31": deformable.LwDetrMLP,
    "e700e6119e5361b1": deformable.GroundingDinoDeformableLayer,
    "e27dd4d73bcc1df1": deformable.Mask2FormerPixelLayer,
    "46bc545e86e47128": deformable.OneFormerPixelLayer,
    "2740326ccce0497b": masked.Mask2FormerDecoderLayer,
    "8484aea33ede5c5c": masked.OneFormerDecoderLayer,
    "1ef759eb55b12ed5": backbones.RfDetrDinov2Layer,
    "49838d96076f51de": backbones.LwDetrViTLayer,
    "65fe060bb08bbf46": backbones.DINOv3Layer,
    "7b7e596e95c55a69": backbones.SegformerLayer,
    "dd5c78419bd11c28": backbones.PvtV2Layer,
    "135b85b6edd6c22e": backbones.PvtV2SelfAttention,
    "398c50058b46f726": backbones.PvtSelfAttention,
    "4c29f0fe2d451489": backbones.BeitLayer,
    "167261bba3a98976": backbones.SamVisionLayer,
    "a42c8975e18c56a6": hiera.Sam2Block,
    "e4693ca6a71d8236": hiera.Sam3ViTLayer,
    "b25600b2d55a4950": hiera.HieraLayer,
    "318b6fb8784544a8": hiera.HieraAttention,
    "714be91fa59c7690": relative.SamVisionAttention,
    "f60526141fa0eabd": relative.VitDetAttention,
    "0d402de836975ea8": relative.VitDetLayer,
    "2127b8d6abe4c57b": backbones.Sam3DetrEncoderLayer,
    "552cca2c4ce3c0f1": backbones.Sam3DetrDecoderLayer,
}
_CHUNK = ("self attention_output", "intermediate output")
_PARTS: dict[str, tuple[type[Module], ...]] = {"dense": (nn.Linear,), "dropout": (nn.Dropout,)}


class HuggingFaceLayers(Adapter):
    """Classes of transformers whose code is that of the layers above."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = kind_of(module)
        ours = _ours(kind)
        if ours is None or isinstance(module, ours):
            return None
        reason = why_not_switch(module) or (why_not_fuse(module, _PARTS) if ours is BertOutput else None)
        if reason is not None:
            return reason
        strange = [n for n, child in module.named_children() if "norm" in n.lower() and not is_norm(child)]
        if strange:
            return f"{', '.join(strange)} is no LayerNorm over the last dimension"
        return joined(ours, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return f"detr_fast.adapters.hugging_face_layers.{joined_of(replacement).__name__}"


def _ours(kind: type[Module]) -> type[Module] | None:
    if not kind.__module__.startswith("transformers."):
        return None
    chunk = getattr(kind, "feed_forward_chunk", None)
    if chunk is not None:
        return BertLayer if reads(chunk) == _CHUNK else None
    return _FORWARDS.get(reads(kind.forward)) or _by_code(kind.forward)


@cache
def _by_code(forward: Any) -> type[Module] | None:
    return _CODE.get(fingerprint(forward) or "")
