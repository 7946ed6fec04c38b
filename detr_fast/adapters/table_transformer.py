"""Table Transformer in Hugging Face transformers: a pre-norm DETR whose attention and layers are its own.

Its attention is outside the attention registry, but its masks come from the mask registry: one of our own there gives the
values of transformers' eager mask through strides of 0, with the padding (B, S) that attention reads instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.models.table_transformer import modeling_table_transformer as theirs

from detr_fast import dispatch
from detr_fast.adapters import hugging_face
from detr_fast.adapters.base import MARK, Adapter, Scriptable, kind_of, names, names_used, why_not_switch
from detr_fast.adapters.blocks import activation_name, comes_apart, feed_forward_sum, is_norm
from detr_fast.adapters.hugging_face import padding_of, with_padding
from detr_fast.adapters.hugging_face_attention import fused
from detr_fast.adapters.hugging_face_blocks import clamped, parts_of_layer
from detr_fast.adapters.hugging_face_contents import are_numbers, watch_linear, watch_norm
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import sum_and_norm
from detr_fast.nn.layer_contents import Contents
from detr_fast.nn.whole_layer import whole
from detr_fast.ops.attention import ATTENTION
from detr_fast.ops.dropout import shared_seed
from detr_fast.ops.layers import DECODER_LAYER, ENCODER_LAYER
from detr_fast.situation import in_layer

NAME = "detr_fast_table"

_LAYER = "self_attn_layer_norm self_attn nn functional dropout training final_layer_norm activation_fn fc1 activation_dropout fc2 "
# What the forwards that we know read; another one computes something else.
_KNOWN = {
    theirs.TableTransformerEncoderLayer: names(_LAYER + "torch isfinite all finfo dtype max clamp"),
    theirs.TableTransformerDecoderLayer: names(_LAYER + "encoder_attn_layer_norm encoder_attn"),
    theirs.TableTransformerAttention: names(
        "size with_pos_embed q_proj scaling _shape k_proj v_proj num_heads head_dim view torch bmm transpose ValueError dtype bool "
        "zeros_like masked_fill_ inf nn functional softmax dropout training reshape out_proj"
    ),
}


class TableTransformerAttention(theirs.TableTransformerAttention, Scriptable):
    """The same attention on `ops.attention`: scores are neither written to memory nor read from it."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        object_queries: Tensor | None = None,
        key_value_states: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor] | None]:
        """As transformers'. Weights that are asked for, and CPU tensors, take the original."""
        if output_attentions or not (dispatch.intervening or hidden_states.is_cuda):
            return super().forward(
                hidden_states,
                attention_mask,
                object_queries,
                key_value_states,
                spatial_position_embeddings,
                output_attentions,
            )
        queries = self.with_pos_embed(hidden_states, object_queries)
        if key_value_states is None:
            keys, values = queries, hidden_states
        else:
            keys, values = self.with_pos_embed(key_value_states, spatial_position_embeddings), key_value_states
        heads = (self.num_heads, self.head_dim)
        q, k, v = (
            projection(x).unflatten(-1, heads)
            for projection, x in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        )
        mask, padding = attention_mask, padding_of(attention_mask)
        if padding is not None:
            mask = None
        elif mask is not None:  # here True means hidden
            mask = ~mask if mask.dtype == torch.bool else mask.to(q.dtype)
        y = ATTENTION(q, k, v, padding, mask, False, self.dropout if self.training else 0.0, self.scaling)
        return self.out_proj(y.flatten(2)), None  # type: ignore[return-value]  # they annotate three and return two


class TableTransformerEncoderLayer(theirs.TableTransformerEncoderLayer, Scriptable):
    """The same layer with its sum and second norm in one op, and without asking the device whether all is finite."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        object_queries: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """As transformers'."""
        parts = parts_of_layer(self) if comes_apart(hidden_states, self.final_layer_norm) else None
        if parts is None:
            return super().forward(hidden_states, attention_mask, object_queries, output_attentions)  # type: ignore[arg-type]
        with shared_seed():
            if not output_attentions:
                tensors = (hidden_states, attention_mask, padding_of(attention_mask), object_queries)
                return (whole(ENCODER_LAYER, self, self._fused, tensors, describe=table_layer),)
            y = self.self_attn_layer_norm(hidden_states)
            y, weights = self.self_attn(y, attention_mask, object_queries, output_attentions=True)  # type: ignore[misc]
            x, y = sum_and_norm(y, hidden_states, self.final_layer_norm, parts.output_dropout_p)
            x = feed_forward_sum(y, parts, x)
        return clamped(x) if self.training else x, weights  # type: ignore[return-value]

    def _fused(self, x: Tensor, mask: Tensor | None, padding: Tensor | None, position: Tensor | None) -> Tensor:
        parts: Any = parts_of_layer(self)
        given = (with_padding(mask, padding), position)
        n, p = self.self_attn_layer_norm(x), parts.output_dropout_p
        x, n = _attend_sum_norm(self.self_attn, self.final_layer_norm, p, n, x, *given)
        x = feed_forward_sum(n, parts, x)
        return clamped(x) if self.training else x


class TableTransformerDecoderLayer(theirs.TableTransformerDecoderLayer, Scriptable):
    """The same layer with its sums and norms in one op each."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        object_queries: Tensor | None = None,
        query_position_embeddings: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor | None, ...]:
        """As transformers'. Without an encoder's output, where transformers' adds up otherwise, the original runs."""
        norms = (self.encoder_attn_layer_norm, self.final_layer_norm)
        parts = (
            parts_of_layer(self) if encoder_hidden_states is not None and comes_apart(hidden_states, *norms) else None
        )
        if parts is None:
            positions = (object_queries, query_position_embeddings)
            memory = (encoder_hidden_states, encoder_attention_mask)
            return super().forward(hidden_states, attention_mask, *positions, *memory, output_attentions)
        queries, p = query_position_embeddings, parts.output_dropout_p
        masks = (attention_mask, padding_of(attention_mask), encoder_attention_mask, padding_of(encoder_attention_mask))
        with shared_seed():
            if not output_attentions:
                tensors = (hidden_states, queries, encoder_hidden_states, object_queries, *masks)
                return (whole(DECODER_LAYER, self, self._fused, tensors, describe=table_layer),)
            weigh = {"output_attentions": True}
            y, own = self.self_attn(self.self_attn_layer_norm(hidden_states), attention_mask, queries, **weigh)
            x, y = sum_and_norm(y, hidden_states, norms[0], p)
            memory = (encoder_hidden_states, object_queries)
            y, cross = self.encoder_attn(y, encoder_attention_mask, queries, *memory, **weigh)
            x, y = sum_and_norm(y, x, norms[1], p)
            return feed_forward_sum(y, parts, x), own, cross

    def _fused(
        self,
        x: Tensor,
        queries: Tensor | None,
        memory: Tensor,
        position: Tensor | None,
        mask: Tensor | None,
        padding: Tensor | None,
        memory_mask: Tensor | None,
        memory_padding: Tensor | None,
    ) -> Tensor:
        parts: Any = parts_of_layer(self)
        n, p = self.self_attn_layer_norm(x), parts.output_dropout_p
        own = (with_padding(mask, padding), queries)
        x, n = _attend_sum_norm(self.self_attn, self.encoder_attn_layer_norm, p, n, x, *own)
        cross = (with_padding(memory_mask, memory_padding), queries, memory, position)
        x, n = _attend_sum_norm(self.encoder_attn, self.final_layer_norm, p, n, x, *cross)
        return feed_forward_sum(n, parts, x)


def _attend_sum_norm(
    attention: Any,
    norm: Any,
    p: float,
    n: Tensor,
    x: Tensor,
    mask: Tensor | None,
    position: Tensor | None,
    memory: Tensor | None = None,
    memory_position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + dropout(attention(n, ...)) and its norm; in few launches where the attention may be taken apart."""
    padding = padding_of(mask)
    if in_layer() and (mask is None or padding is not None):
        options = (padding, None, False, attention.dropout if attention.training else 0.0)
        sources = (n, position, memory, memory_position)
        found = fused(attention, attention.out_proj, norm, p, sources, options, residual=x)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return sum_and_norm(attention(n, mask, position, memory, memory_position)[0], x, norm, p)


def table_layer(found: Contents, layer: Any) -> bool:
    """What an encoder or decoder layer computes from (see `nn.whole_layer`)."""
    activation = activation_name(layer.activation_fn)
    if activation is None or not are_numbers(layer, "dropout", "activation_dropout"):
        return False
    found.note(layer, "training", drops=("dropout", "activation_dropout"))
    found.keep(layer, "activation_fn")
    found.settings.append(activation)
    found.hidden = layer.fc1.out_features
    for name, part in layer._modules.items():
        if not is_bare(part):
            return False
        if name == "activation_fn":
            found.watch(part, name)
            found.keep(part, "approximate", "act")
        elif isinstance(part, TableTransformerAttention):
            if part.scaling != part.head_dim**-0.5 or not are_numbers(part, "dropout"):
                return False
            found.watch(part, name, "num_heads", "head_dim", drops=("dropout",))
            found.keep(part, "scaling", MARK)
            if not all(watch_linear(found, f"{name}.{child}", one) for child, one in part._modules.items()):
                return False
        elif not (watch_norm if is_norm(part) else watch_linear)(found, name, part):
            return False
    return True


def mask(batch_size: int, q_length: int, kv_length: int, *rest: Any, **options: Any) -> Tensor | None:
    """transformers' eager mask (B, 1, L, S), 0 or the lowest number, kept as small as the padding that it is made of."""
    visible = hugging_face.mask(batch_size, q_length, kv_length, *rest, **options)
    if visible is None:
        return None
    padding = padding_of(visible)
    if padding is None and visible.stride(2) != 0:
        return eager_mask(batch_size, q_length, kv_length, *rest, **options)
    dtype = options.get("dtype", torch.float32)
    row = torch.where(visible[:, :, :1], torch.zeros((), device=visible.device, dtype=dtype), torch.finfo(dtype).min)
    return hugging_face.with_padding(row.expand(visible.shape), padding)


class TableTransformer(Adapter):
    """transformers' TableTransformerAttention and layers, and the masks that its encoder and decoder make."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = kind_of(module)
        if kind in _STACKS:
            ready = module.config._attn_implementation == "eager"  # type: ignore[union-attr]
            ready = ready and hugging_face.why_not_masks() is None
            return kind if ready and why_not_switch(module) is None else None
        original = next((one for one in _REPLACEMENTS if isinstance(module, one)), None)
        if original is None or isinstance(module, _REPLACEMENTS[original]):
            return None
        if kind is not original:
            return f"a subclass of {original.__name__}"
        if unknown := names_used(original.forward) - _KNOWN[original]:
            return f"this version of transformers computes it differently ({', '.join(sorted(unknown))})"
        return why_not_switch(module) or _REPLACEMENTS[original]

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return "padding as (batch, keys)" if replacement in _STACKS else super().describe(replacement)

    @classmethod
    def switched(cls, module: Module) -> None:
        if type(module) in _STACKS:
            module.config._attn_implementation_internal = NAME  # type: ignore[union-attr]

    @classmethod
    def again(cls, module: Module) -> str | None:
        if type(module) in _STACKS and module.config._attn_implementation == "eager":  # type: ignore[union-attr]
            cls.switched(module)
        return None

    @classmethod
    def restored(cls, module: Module) -> None:
        if type(module) in _STACKS:
            module.config._attn_implementation_internal = "eager"  # type: ignore[union-attr]


_STACKS = (theirs.TableTransformerEncoder, theirs.TableTransformerDecoder)
_REPLACEMENTS: dict[type[Module], type[Module]] = {
    theirs.TableTransformerAttention: TableTransformerAttention,
    theirs.TableTransformerEncoderLayer: TableTransformerEncoderLayer,
    theirs.TableTransformerDecoderLayer: TableTransformerDecoderLayer,
}
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
