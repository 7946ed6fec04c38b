"""Stacks of layers, ours and torch.nn's with the same parameters, that several test files share."""

from __future__ import annotations

from torch import nn as torch_nn

from detr_fast import nn


def decoders(layers=3, **options):
    settings = {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "dropout": 0.0, "batch_first": True, **options}
    ours, original = (s.TransformerDecoder(s.TransformerDecoderLayer(**settings), layers) for s in (nn, torch_nn))
    for parameter in original.parameters():  # the layers are copies of one
        torch_nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(original.state_dict())
    return ours, original


def stacks(name, layers=2, **options):
    """A stack of ours and torch.nn's, pre-norm, with one norm behind, of random weights."""
    settings = {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "dropout": 0.0, "batch_first": True, **options}
    made = []
    for source in (nn, torch_nn):
        layer = getattr(source, f"Transformer{name}Layer")(**settings, norm_first=True)
        made.append(getattr(source, f"Transformer{name}")(layer, layers, source.LayerNorm(settings["d_model"])))
    for parameter in made[1].parameters():
        torch_nn.init.normal_(parameter, std=0.3)
    made[0].load_state_dict(made[1].state_dict())
    return made
