"""MultiheadAttention through the dispatcher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast import dispatch
from detr_fast.dispatch import BackendError, Implementation
from detr_fast.nn.casts import cast_of, with_casts
from detr_fast.nn.memory import Projected, share_of
from detr_fast.nn.replacements import replaces
from detr_fast.nn.stand_ins import stand_in
from detr_fast.nn.tracing import as_leaf, is_traced
from detr_fast.ops.attention import ATTENTION, Sdpa
from detr_fast.ops.attention_call import Weights
from detr_fast.ops.attention_packed import run_packed, unpacked
from detr_fast.ops.qkv_projection import project

Output = tuple[Tensor, Tensor | None]


class _Plan(NamedTuple):
    """What runs a call, and what it gets besides q, k and v: masks as ops take them, dropout and the weights asked for."""

    implementation: Implementation
    options: tuple[Any, ...]


def attention_inputs(
    x: Tensor, memory: Tensor | None, position: Tensor | None, memory_key: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value of `MultiheadAttention.heads`."""
    query = x if position is None else x + position
    if memory is None:
        return query, query, x
    return query, memory if memory_key is None else memory_key, memory


@replaces(nn.MultiheadAttention)
class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`, on the implementation that the dispatcher chooses for `ops.attention`.

    Arguments, shapes, state_dict and errors are its own. Where PyTorch's own is chosen, the original's forward runs, with its inference fast path and nested tensors. Where a
    Triton kernel is chosen, or an implementation was asked for by name, projections and attention run here, in the layout
    that the projections leave, and masks stay as small as they were given.

    There a query without any visible key attends to nothing: its weights and its heads' output are zero, and so are its
    gradients, where torch.nn gives NaN or zeros depending on the path it takes.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Output:
        """As torch.nn.MultiheadAttention's: shapes, masks (bool: True = hidden), result (output, weights or None)."""
        # False for tensors that are not on a GPU; torch.fx's Proxy answers with another Proxy.
        if dispatch.intervening or query.is_cuda is not False or is_traced(key):
            if is_traced(query) or is_traced(key):
                options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
                if (node := as_leaf(self, (query, key, value, *options))) is not None:
                    return node  # type: ignore[no-any-return]
            weights: Weights = ("mean" if average_attn_weights else "heads") if need_weights else None
            plan = self._plan(query, key, value, key_padding_mask, attn_mask, is_causal, weights)
            if plan is not None:
                return self._attend(plan, query, key, value)
        return nn.MultiheadAttention.forward(
            with_casts(self),
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )

    def runs_here(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> bool:
        """Whether such a call, without weights, runs here; otherwise the original's forward does.

        Raises BackendError (see `use_backend`).
        """
        return self._plan(query, key, value, key_padding_mask, attn_mask, is_causal, None) is not None

    def heads(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        position: Tensor | None = None,
        memory_key: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """What the output projection would get, (..., C) as x, of attention(x + position, key, value), and x.

        Key and value are memory_key (memory where None) and memory, or x + position and x without a memory. The x
        returned is to serve as the residual of a fused kernel, and nothing else. None where the original's forward is to run. Raises BackendError (see `use_backend`).
        """
        masks = (key_padding_mask, attn_mask, is_causal)
        value = x if memory is None else memory
        packable = self._qkv_same_embed_dim and not self._extra_keys
        plan = self._plan(x, value, value, *masks, None, position, memory_key) if packable else None
        if plan is not None:
            packs, x = self._stream_packs(x, memory, position, memory_key)
            return self._run_packs(plan, packs, x.ndim), x
        if packable:
            return None
        query, key, value = attention_inputs(x, memory, position, memory_key)
        plan = self._plan(query, key, value, *masks, None)
        return None if plan is None else (self._attend_heads(plan, query, key, value)[0], x)

    def _plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        weights: Weights,
        *added: Tensor | None,
    ) -> _Plan | None:
        """What runs a call, or None for the original; `added` are further tensors that q or k will be computed from."""
        requested = ATTENTION.requested
        if query.is_nested or key.is_nested or value.is_nested:
            if requested is not None:
                raise BackendError(
                    f"attention was asked to run on {requested!r} but got nested tensors, which only torch.nn's own "
                    "inference fast path takes. Use padded tensors with key_padding_mask, or attention='auto'."
                )
            return None
        plain = weights is None and self._qkv_same_embed_dim and not self._extra_keys
        if (
            plain
            and not torch.compiler.is_compiling()
            and ATTENTION.is_small(query.nbytes + 2 * key.nbytes, query.device)
        ):
            return None
        dtype = self._computed_dtype(query)
        # Added to scores: of their dtype, or what SDPA takes besides; materialised weights are stricter.
        mask_dtypes = {query.dtype, dtype} if weights else {query.dtype, dtype, torch.float32}
        masks_fit = all(m is None or is_mask(m, mask_dtypes) for m in (key_padding_mask, attn_mask))
        if not masks_fit or not self._fits(query, key, value, key_padding_mask, attn_mask, is_causal):
            return None  # the original says what is wrong
        # Weights that are asked for are masked by the mask itself, whatever the hint says.
        masks = self._masks(query, key_padding_mask, attn_mask, is_causal and not weights, dtype)
        dropout_p = float(self.dropout) if self.training else 0.0
        options = (*masks, dropout_p, None, False, False, weights)
        choice = ATTENTION.choose(*self._stand_ins(query, key, value, dtype, *added), *options)
        if requested is None and isinstance(choice, Sdpa):
            return None
        return _Plan(choice, options)

    def _attend(self, plan: _Plan, query: Tensor, key: Tensor, value: Tensor) -> Output:
        heads, weights = self._attend_heads(plan, query, key, value)
        return F.linear(heads, cast_of(self.out_proj.weight), cast_of(self.out_proj.bias)), weights

    def _attend_heads(self, plan: _Plan, query: Tensor, key: Tensor, value: Tensor) -> Output:
        packs = self._project(query, key, value)
        if plan.options[-1] is None and not self._extra_keys:
            return self._run_packs(plan, packs, query.ndim), None
        q, k, v = unpacked([self._heads(pack, query.ndim) for pack in packs])
        y, weights = plan.implementation.run(q, *self._with_extra_keys(k, v), *plan.options), None
        if isinstance(y, tuple):
            y, weights = y
        if query.ndim == 2:
            weights = None if weights is None else weights.squeeze(0)
        return self._in_layout(y, query.ndim), weights

    def _run_packs(self, plan: _Plan, packs: list[Tensor], dims: int) -> Tensor:
        """Attention over projections in the inputs' layout (..., n * C): (..., C)."""
        heads = [self._heads(pack, dims) if pack.ndim <= 3 else pack for pack in packs]
        y = run_packed(plan.implementation, heads, *plan.options[:4])
        return self._in_layout(y, dims)

    def _in_layout(self, y: Tensor, dims: int) -> Tensor:
        """(B, L, H, E) -> (B, L, C), (L, B, C) or (L, C), as the inputs are."""
        if dims == 2:
            y = y.squeeze(0)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return y.flatten(-2)

    def _computed_dtype(self, query: Tensor) -> torch.dtype:
        """The projections' dtype."""
        # A parametrised weight is computed each time it is read: spectral_norm, for one, goes a step further by that.
        weight: Tensor | None = self.out_proj._parameters.get("weight")
        if weight is None:
            weight = next(self.out_proj.parameters(), None)
        if weight is None:
            weight = self.out_proj.weight  # FSDP's, a view of what holds all parameters
        own, device = weight.dtype, query.device.type
        if own == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):  # meta knows no autocast
            return own
        return torch.get_autocast_dtype(device)

    @property
    def _extra_keys(self) -> int:
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def _sizes(self, query: Tensor, key: Tensor) -> tuple[int, int, int]:
        """Batch, queries and keys, without the extra ones."""
        if query.ndim == 2:
            return 1, query.shape[0], key.shape[0]
        batch, length = (0, 1) if self.batch_first else (1, 0)
        return query.shape[batch], query.shape[length], key.shape[length]

    def _fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether shapes and settings are what the documentation asks for."""
        if (self.bias_k is None) != (self.bias_v is None) or not 0 <= self.dropout <= 1:
            return False
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
            return False
        batch, queries, keys = self._sizes(query, key)
        widths = (query.shape[-1], key.shape[-1], value.shape[-1])
        if widths != (self.embed_dim, self.kdim, self.vdim) or key.shape[:-1] != value.shape[:-1]:
            return False
        if query.ndim == 3 and key.shape[0 if self.batch_first else 1] != batch:
            return False
        if key_padding_mask is not None:
            expected: tuple[int, ...] = (keys,) if query.ndim == 2 else (batch, keys)
            if key_padding_mask.shape != expected:
                return False
        if attn_mask is None:
            return not is_causal
        return attn_mask.shape in ((queries, keys), (batch * self.num_heads, queries, keys))

    def _masks(
        self,
        query: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None, bool]:
        """The masks as ops take them: padding (B, S) bool, mask (B or 1, H or 1, L or 1, S), and whether it is causal."""
        extra = self._extra_keys
        # As in torch.nn the hint hides added keys, which lie behind the diagonal, unless there is padding to merge.
        causal = is_causal and not (extra and key_padding_mask is not None)
        mask = None if causal else attn_mask
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        padding = key_padding_mask
        if padding is not None and query.ndim == 2:
            padding = padding.unsqueeze(0)
        if padding is not None and padding.dtype != torch.bool:
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=padding.dtype).masked_fill_(mask, float("-inf"))
            added = padding[:, None, None, :]
            padding, mask = None, added if mask is None else mask + added
        if extra:  # the last keys, which nothing hides: False in torch.nn's polarity, nothing added to the scores
            padding, mask = (None if m is None else F.pad(m, (0, extra)) for m in (padding, mask))
        if mask is not None:
            mask = ~mask if mask.dtype == torch.bool else mask.to(dtype)
        return padding, mask, causal

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v in the inputs' layout (…, n * C): one matrix product, of n of them, for inputs that are one tensor."""
        if not self._qkv_same_embed_dim:
            biases = (None, None, None) if self.in_proj_bias is None else cast_of(self.in_proj_bias).chunk(3)
            weights = map(cast_of, (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
            return list(map(F.linear, (query, key, value), weights, biases))
        if (projected := share_of(self, value, key)) is not None:
            return [F.linear(query, projected.weight, projected.bias), *projected.packs]
        inputs, shares = [query], [1]
        for tensor in (key, value):
            if tensor is inputs[-1]:
                shares[-1] += 1
            else:
                inputs.append(tensor)
                shares.append(1)
        return list(map(F.linear, inputs, *self.in_parameters(shares)))

    def in_parameters(self, shares: list[int]) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """Weights and biases that project shares[i] of q, k and v each: by `split`, whose backward is one launch."""
        weight, bias = cast_of(self.in_proj_weight), cast_of(self.in_proj_bias)
        if len(shares) == 1:
            return [weight], [bias]
        rows = [share * self.embed_dim for share in shares]
        return weight.split(rows), [None] * len(shares) if bias is None else bias.split(rows)

    def _stream_packs(
        self,
        x: Tensor,
        memory: Tensor | None,
        position: Tensor | None,
        memory_key: Tensor | None,
    ) -> tuple[list[Tensor], Tensor]:
        """Projections for `_run_packs`, and x to go on with (see `project`)."""
        width = self.embed_dim
        if memory is None:
            found = project(x, cast_of(self.in_proj_weight), cast_of(self.in_proj_bias), position, 2 * width)
            if found is not None:
                return [found[0]], found[1]
            assert position is not None  # two products: of x + position, and of x
            weights, biases = self.in_parameters([2, 1])
            found = project(x, weights[1], biases[1])
            assert found is not None
            return [F.linear(x + position, weights[0], biases[0]), found[0]], found[1]
        projected = share_of(self, memory, memory_key)
        if projected is None:
            inputs = [memory] if memory_key is None else [memory_key, memory]
            weights, biases = self.in_parameters([1, 2] if memory_key is None else [1, 1, 1])
            projected = Projected(weights[0], biases[0], list(map(F.linear, inputs, weights[1:], biases[1:])))
        found = project(x, projected.weight, projected.bias, position, width)
        assert found is not None  # its position is in all columns
        return [found[0], *projected.packs], found[1]

    def _heads(self, projected: Tensor, dims: int) -> Tensor:
        """(B, L, n * C), (L, B, n * C) or (L, n * C) -> (B, L, n, H, E), without a copy."""
        heads = projected.unflatten(-1, (-1, self.num_heads, self.head_dim))
        if dims == 2:
            return heads.unsqueeze(0)
        return heads if self.batch_first else heads.transpose(0, 1)

    def _with_extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, S, H, E) with the bias and the zeros that the constructor asked for behind them."""
        if not self._extra_keys:
            return k, v
        shape = (k.shape[0], 1, self.num_heads, self.head_dim)
        keys, values = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.to(k.dtype).view(1, 1, *shape[2:]).expand(shape))
            values.append(self.bias_v.to(v.dtype).view(1, 1, *shape[2:]).expand(shape))
        if self.add_zero_attn:
            keys.append(k.new_zeros(shape))
            values.append(v.new_zeros(shape))
        return torch.cat(keys, 1), torch.cat(values, 1)

    def _stand_ins(
        self, query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype, *added: Tensor | None
    ) -> list[Tensor]:
        """Tensors without memory that look like the q, k, v to come: the choice is made before anything is computed."""
        batch, queries, keys = self._sizes(query, key)
        width = self.embed_dim
        packed = [1, 1, 1]
        if self._qkv_same_embed_dim:
            same = (query is key, key is value)
            packed = [3, 3, 3] if all(same) else [2, 2, 1] if same[0] else [1, 2, 2] if same[1] else packed
        if self._extra_keys:
            keys, packed[1:] = keys + self._extra_keys, [1, 1]
        parameters = (
            self.in_proj_weight,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
            self.in_proj_bias,
        )
        tensors = (query, key, value, *added, self.bias_k, self.bias_v, *parameters)
        grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        first = self.batch_first or query.ndim == 2
        copied = first or self._extra_keys > 0
        stand_ins = []
        for length, share, batch_first in zip((queries, keys, keys), packed, (first, copied, copied)):
            row = share * width
            shape = (batch, length, self.num_heads, self.head_dim)
            stride = (length * row, row, self.head_dim, 1) if batch_first else (row, batch * row, self.head_dim, 1)
            stand_ins.append(stand_in(query, shape, stride, dtype, grad))
        return stand_ins


def is_mask(value: Any, dtypes: Iterable[torch.dtype] | None = None) -> bool:
    """Whether this is a tensor of bool or of a floating-point dtype (one of `dtypes`)."""
    if not isinstance(value, Tensor):
        return False
    return value.dtype == torch.bool or (value.is_floating_point() and (dtypes is None or value.dtype in dtypes))
