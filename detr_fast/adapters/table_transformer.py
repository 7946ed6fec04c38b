"""Table Transformer in Hugging Face transformers: DETR with an attention class of its own, outside the registries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module
from transformers.models.table_transformer import modeling_table_transformer as theirs

from detr_fast import dispatch
from detr_fast.adapters.base import Adapter, names, names_used, why_not_switch
from detr_fast.ops.attention import ATTENTION

# What the forward that we know reads; another one computes something else.
_KNOWN = names(
    "size with_pos_embed q_proj scaling _shape k_proj v_proj num_heads head_dim view torch bmm transpose ValueError dtype bool "
    "zeros_like masked_fill_ inf nn functional softmax dropout training reshape out_proj"
)


class TableTransformerAttention(theirs.TableTransformerAttention):
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
        mask = attention_mask
        if mask is not None:  # here True means hidden
            mask = ~mask if mask.dtype == torch.bool else mask.to(q.dtype)
        y = ATTENTION(q, k, v, None, mask, False, self.dropout if self.training else 0.0, self.scaling)
        return self.out_proj(y.flatten(2)), None  # type: ignore[return-value]  # they annotate three and return two


class TableTransformer(Adapter):
    """transformers' TableTransformerAttention."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        original = theirs.TableTransformerAttention
        if not isinstance(module, original) or isinstance(module, TableTransformerAttention):
            return None
        if type(module) is not original:
            return f"a subclass of {original.__name__}"
        if unknown := names_used(original.forward) - _KNOWN:
            return f"this version of transformers computes it differently ({', '.join(sorted(unknown))})"
        return why_not_switch(module) or TableTransformerAttention
