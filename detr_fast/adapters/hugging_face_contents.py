"""What Hugging Face's DETR layers compute from, for their host programs (see `nn.whole_layer`).

Their attention is two modules whose code asks transformers' registry, their feed-forward block is another; dropouts are numbers.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from detr_fast.adapters.base import MARK, reads
from detr_fast.adapters.blocks import is_norm
from detr_fast.adapters.feed_forward import parts_of
from detr_fast.adapters.hugging_face import NAME, attention
from detr_fast.nn.bare import is_bare
from detr_fast.nn.layer_contents import Contents

_IMPLEMENTATION = "_attn_implementation_internal"  # in a configuration's __dict__
_BODY = (
    "shape head_dim q_proj view transpose k_proj v_proj ALL_ATTENTION_FUNCTIONS get_interface config _attn_implementation "
    "eager_attention_forward training attention_dropout scaling reshape contiguous o_proj"
)
# The attentions that we know, by the arguments of a forward and what it reads.
_ATTENTIONS = {
    ("self hidden_states attention_mask position_embeddings", _BODY),
    ("self hidden_states key_value_states attention_mask position_embeddings encoder_position_embeddings", _BODY),
}


def detr_layer(found: Contents, layer: nn.Module) -> bool:
    """An encoder or decoder layer of DETR's; whether each part is what is expected, and may be taken apart."""
    if not are_numbers(layer, "dropout"):
        return False
    found.note(layer, "training", drops=("dropout",))
    for name, part in layer._modules.items():
        if part is None or not is_bare(part):
            return False
        if is_norm(part):
            if not watch_norm(found, name, part):
                return False
        elif not (_attention(found, name, part) or _feed_forward(found, name, part)):
            return False
    return True


def watch_norm(found: Contents, path: str, part: Any) -> bool:
    if part.weight is None:
        return False
    found.watch(part, path, "eps", "normalized_shape")
    return True


def _attention(found: Contents, path: str, part: Any) -> bool:
    state, config = part.__dict__, vars(part.__dict__.get("config", part))
    if MARK not in state or config.get(_IMPLEMENTATION) != NAME or ALL_ATTENTION_FUNCTIONS.get(NAME) is not attention:
        return False
    if reads(type(part).forward) not in _ATTENTIONS or not are_numbers(part, "attention_dropout"):
        return False
    biases = {one.bias is None for one in (part.q_proj, part.k_proj, part.v_proj) if type(one) is nn.Linear}
    if part.scaling != part.head_dim**-0.5 or part.is_causal or len(biases) != 1:
        return False
    found.watch(part, path, "head_dim", drops=("attention_dropout",))
    found.keep(part, "config", "scaling", "is_causal", MARK)
    found.expect(type(part))
    found.place(config, _IMPLEMENTATION)
    for registry in ("_local_mapping", "_global_mapping"):
        found.place(getattr(ALL_ATTENTION_FUNCTIONS, registry, {}), NAME)
    return all(watch_linear(found, f"{path}.{name}", one) for name, one in part._modules.items())


def _feed_forward(found: Contents, path: str, part: Any) -> bool:
    parts = parts_of(part)
    if parts is None:
        return False
    names = part.detr_fast_names
    drops = [name for name in (names.dropout, names.output_dropout) if name is not None]
    if not are_numbers(part, *drops):
        return False
    found.watch(part, path, drops=(*drops,))
    found.keep(part, names.activation)
    found.settings.append(parts.activation)
    found.hidden = parts.first.out_features
    for name, one in part._modules.items():
        if name == names.activation:
            found.watch(one, f"{path}.{name}")
            found.keep(one, "approximate", "act")
        elif not watch_linear(found, f"{path}.{name}", one):
            return False
    return True


def watch_linear(found: Contents, path: str, part: Any) -> bool:
    if type(part) is not nn.Linear or not is_bare(part):
        return False
    found.watch(part, path)
    return True


def are_numbers(part: nn.Module, *names: str) -> bool:
    return all(type(part.__dict__.get(name)) in (int, float) for name in names)
