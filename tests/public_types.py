"""What type checkers are told of ops whose result goes by a flag: checked by mypy alone, and never run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from detr_fast import ops

if TYPE_CHECKING:
    from typing_extensions import assert_type

    Both = tuple[Tensor, Tensor]

    def one_or_both(x: Tensor, weight: Tensor, flag: bool) -> None:
        assert_type(ops.add_layer_norm(x, x, weight), Tensor)
        assert_type(ops.add_layer_norm(x, x, weight, return_sum=True), Both)
        assert_type(ops.add_layer_norm(x, x, weight, return_sum=flag), Tensor | Both)
        assert_type(ops.add_rms_norm(x, x, weight), Tensor)
        assert_type(ops.add_rms_norm(x, x, weight, return_sum=True), Both)
        assert_type(ops.linear_add_layer_norm(x, weight, None, x, weight), Tensor)
        assert_type(ops.linear_add_layer_norm(x, weight, None, x, weight, return_sum=True), Both)
        assert_type(ops.feed_forward_add_layer_norm(x, weight, None, weight, None, weight), Tensor)
        assert_type(ops.feed_forward_add_layer_norm(x, weight, None, weight, None, weight, return_sum=True), Both)
        assert_type(ops.attention(x, x, x), Tensor)
        assert_type(ops.attention(x, x, x, return_lse=True), Both)
