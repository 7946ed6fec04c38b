"""Writing tokens one by one: key/value caches, greedy choice, top-k sampling, beam search.

With a cache a step computes the newest token only: every layer keeps its keys and values of the tokens so far, and the
encoder's output goes through the layers' key and value projections once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import nn, ops
from detr_fast.nn.bare import has_hooks

if TYPE_CHECKING:
    from detr_fast.models.seq2seq import Seq2Seq

CACHES = ("growing", "static", None)


class GrowingCache:
    """Keys and values so far; the buffer doubles when it is full, so that a step attends to no more than there is.

    Args:
        layers: of the decoder.
        like: (N, …, H, E), of the keys' and values' dtype and device.
    """

    def __init__(self, layers: int, like: Tensor) -> None:
        self._buffer = like.new_zeros(layers, 2, like.shape[0], 16, *like.shape[-2:])
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The newest k and v (N, 1, H, E) -> all so far (N, S, H, E), and which of them are hidden: none."""
        if self.length == self._buffer.shape[3]:
            self._buffer = torch.cat((self._buffer, torch.zeros_like(self._buffer)), dim=3)
        keys, values = self._buffer[layer, :, :, : self.length + 1]
        keys[:, -1:], values[:, -1:] = k, v
        return keys, values, None

    def advance(self) -> None:
        self.length += 1

    def reorder(self, rows: Tensor) -> None:
        """Go on with the sequences `rows` (N,)."""
        self._buffer = self._buffer.index_select(2, rows)


class StaticCache:
    """Keys and values in a buffer of one size, the slots not yet written hidden.

    No shape and no value on the host changes from step to step: a step can be compiled or captured in a CUDA graph once.

    Args:
        layers, like: as GrowingCache's.
        capacity: the longest sequence.
    """

    def __init__(self, layers: int, like: Tensor, capacity: int) -> None:
        self._buffer = like.new_zeros(layers, 2, like.shape[0], capacity, *like.shape[-2:])
        self._slots = torch.arange(capacity, device=like.device)
        self.length = torch.zeros(1, dtype=torch.long, device=like.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The newest k and v (N, 1, H, E) -> the buffer's (N, capacity, H, E) and which of them are hidden (N, capacity)."""
        keys, values = self._buffer[layer]
        keys.index_copy_(1, self.length, k)
        values.index_copy_(1, self.length, v)
        return keys, values, (self._slots > self.length).expand(k.shape[0], -1)

    def advance(self) -> None:
        self.length += 1

    def reorder(self, rows: Tensor) -> None:
        """Go on with the sequences `rows` (N,)."""
        self._buffer.copy_(self._buffer.index_select(2, rows))


class Decoder(Protocol):
    """Decodes the sequences of a batch side by side."""

    def step(self, tokens: Tensor) -> Tensor:
        """The newest token of each sequence (N,) -> logits of the next (N, V)."""

    def reorder(self, rows: Tensor) -> None:
        """Go on with the sequences `rows` (N,)."""


class PrefixDecoder:
    """Without a cache: every step runs the decoder over all tokens so far."""

    def __init__(self, model: Seq2Seq, memory: Tensor, padding: Tensor | None, copies: int) -> None:
        self._model = model
        self._memory = memory.repeat_interleave(copies, 0)
        self._padding = None if padding is None else padding.repeat_interleave(copies, 0)
        self._tokens = torch.empty(len(self._memory), 0, dtype=torch.long, device=memory.device)

    def step(self, tokens: Tensor) -> Tensor:
        self._tokens = torch.cat((self._tokens, tokens[:, None]), dim=1)
        features = self._model.decode(self._tokens, self._memory, self._padding)
        return self._model.head.logits(features[:, -1])

    def reorder(self, rows: Tensor) -> None:
        self._tokens = self._tokens.index_select(0, rows)


class CachedDecoder:
    """With a cache: every step runs the decoder over the newest token only."""

    def __init__(
        self, model: Seq2Seq, memory: Tensor, padding: Tensor | None, copies: int, cache: str, capacity: int
    ) -> None:
        self._model = model
        self._padding = padding
        self._copies = copies
        if not _is_called_plainly(model.decoder, nn.TransformerDecoder, torch.nn.TransformerDecoder):
            raise TypeError(
                f"the decoder, a {type(model.decoder).__name__}, is wrapped, hooked or replaced, which a cache would pass over: "
                "use cache=None"
            )
        self._layers = [_supported(layer) for layer in model.decoder.layers]
        self._memory = [_projected(layer.multihead_attn, memory, 1, 3) for layer in self._layers]
        like = self._memory[0][0].repeat_interleave(copies, 0)
        self._cache: GrowingCache | StaticCache
        if cache == "static":
            self._cache = StaticCache(len(self._layers), like, capacity)
        else:
            self._cache = GrowingCache(len(self._layers), like)

    def step(self, tokens: Tensor) -> Tensor:
        model = self._model
        x = model.embed(tokens[:, None], self._cache.length)
        for index, layer in enumerate(self._layers):
            if layer.norm_first:
                x = x + self._attend_to_itself(index, layer.norm1(x))
                x = x + self._attend_to_memory(index, layer.norm2(x))
                x = x + layer._ff_block(layer.norm3(x))
            else:
                x = layer.norm1(x + self._attend_to_itself(index, x))
                x = layer.norm2(x + self._attend_to_memory(index, x))
                x = layer.norm3(x + layer._ff_block(x))
        self._cache.advance()
        x = x if model.decoder.norm is None else model.decoder.norm(x)
        return model.head.logits(x[:, 0])

    def reorder(self, rows: Tensor) -> None:
        self._cache.reorder(rows)  # sequences change places only among those of one source

    def _attend_to_itself(self, index: int, x: Tensor) -> Tensor:
        attention = self._layers[index].self_attn
        q, k, v = _projected(attention, x, 0, 3)
        k, v, hidden = self._cache.append(index, k, v)
        return attention.out_proj(ops.attention(q, k, v, key_padding_mask=hidden).flatten(2))

    def _attend_to_memory(self, index: int, x: Tensor) -> Tensor:
        attention = self._layers[index].multihead_attn
        k, v = self._memory[index]
        (q,) = _projected(attention, x, 0, 1)
        q = q.unflatten(0, (-1, self._copies)).squeeze(2)  # the copies of a source are queries side by side
        y = ops.attention(q, k, v, key_padding_mask=self._padding)
        return attention.out_proj(y.flatten(2).flatten(0, 1)[:, None])


def start(
    model: Seq2Seq, memory: Tensor, padding: Tensor | None, *, cache: str | None, capacity: int, copies: int = 1
) -> Decoder:
    """A decoder of `copies` sequences for each source, of up to `capacity` tokens each."""
    if cache not in CACHES:
        raise ValueError(f"got cache={cache!r}; expected 'growing', 'static' or None")
    if cache is None:
        return PrefixDecoder(model, memory, padding, copies)
    return CachedDecoder(model, memory, padding, copies, cache, capacity)


def generate(
    model: Seq2Seq,
    memory: Tensor,
    padding: Tensor | None,
    max_length: int,
    choose: Callable[[Tensor], Tensor],
    cache: str | None,
) -> Tensor:
    """Write one sequence for each source, each next token as `choose` says: logits (N, V) -> tokens (N,)."""
    batch, device = memory.shape[0], memory.device
    decoder = start(model, memory, padding, cache=cache, capacity=max_length)
    written = torch.full((batch, max_length), model.padding_idx, device=device)
    newest = torch.full((batch,), model.bos_idx, device=device)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    for position in range(max_length if batch else 0):
        newest = choose(_without_special(model, decoder.step(newest)))
        newest = newest.masked_fill(finished, model.padding_idx)
        written[:, position] = newest
        finished = finished | (newest == model.eos_idx)
        if _is_time_to_look(position, device) and bool(finished.all()):
            break
    return written[:, : _longest(written, model.padding_idx)]


def greedy(logits: Tensor) -> Tensor:
    """logits (N, V) -> the likeliest token (N,)."""
    return logits.argmax(-1)


def top_k_sampling(k: int, temperature: float, generator: torch.Generator | None) -> Callable[[Tensor], Tensor]:
    """Draw one of the `k` likeliest tokens, by their probabilities at `temperature`.

    Source: Fan et al., 2018, arXiv:1805.04833.
    """
    if k < 1:
        raise ValueError(f"got top_k={k}; expected at least 1")
    if not temperature > 0.0:  # NaN, too
        raise ValueError(f"got temperature={temperature}; expected more than 0; without top_k decoding is greedy")

    def choose(logits: Tensor) -> Tensor:
        values, indices = logits.topk(min(k, logits.shape[-1]))
        drawn = torch.multinomial((values.float() / temperature).softmax(-1), 1, generator=generator)
        return indices.gather(1, drawn).squeeze(1)

    return choose


class Beams(NamedTuple):
    """What beam search found, the best first.

    Attributes:
        tokens: (N, beams, L), each ending with eos and filled up with padding.
        scores: (N, beams), log-probability / length^length_penalty; -inf where there were not as many sequences.
    """

    tokens: Tensor
    scores: Tensor


def beam_search(
    model: Seq2Seq,
    memory: Tensor,
    padding: Tensor | None,
    max_length: int,
    beams: int,
    length_penalty: float,
    cache: str | None,
) -> Beams:
    """The `beams` best sequences that are found by keeping as many at every step; see Seq2Seq.beam_search."""
    if beams < 1:
        raise ValueError(f"got {beams} beams; expected at least 1")
    batch, device = memory.shape[0], memory.device
    decoder = start(model, memory, padding, cache=cache, capacity=max_length, copies=beams)
    written = torch.full((batch, beams, max_length), model.padding_idx, device=device)
    newest = torch.full((batch * beams,), model.bos_idx, device=device)
    finished = torch.zeros(batch, beams, dtype=torch.bool, device=device)
    dtype = torch.promote_types(memory.dtype, torch.float32)
    lengths = torch.zeros(batch, beams, device=device, dtype=dtype)
    scores = torch.full((batch, beams), float("-inf"), device=device, dtype=dtype)  # all beams are still the same one
    scores[:, 0] = 0.0
    ranks = scores
    for position in range(max_length if batch else 0):
        gains = decoder.step(newest).unflatten(0, (batch, beams)).log_softmax(-1, dtype=dtype)
        gains = _without_special(model, gains).masked_fill(finished[..., None], float("-inf"))
        gains[..., model.padding_idx].masked_fill_(finished, 0.0)  # a finished beam stays as it is
        totals = scores[..., None] + gains
        longer = lengths + ~finished
        ranks, chosen = (totals / longer[..., None] ** length_penalty).flatten(1).topk(beams)
        parents, newest = chosen // gains.shape[-1], chosen % gains.shape[-1]
        scores = totals.flatten(1).gather(1, chosen)
        lengths, finished = longer.gather(1, parents), finished.gather(1, parents)
        written = written.gather(1, parents[..., None].expand_as(written))
        written[..., position] = newest
        finished = finished | (newest == model.eos_idx)
        if _is_time_to_look(position, device) and bool(finished.all()):
            break
        newest = newest.flatten()
        decoder.reorder((parents + beams * torch.arange(batch, device=device)[:, None]).flatten())
    written = written.masked_fill(ranks.isneginf()[..., None], model.padding_idx)
    return Beams(written[..., : _longest(written.flatten(0, 1), model.padding_idx)], ranks)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; afterwards every module trains or not as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _without_special(model: Seq2Seq, scores: Tensor) -> Tensor:
    """The scores (…, V), changed in place: padding and bos are never written."""
    scores[..., model.padding_idx] = float("-inf")
    scores[..., model.bos_idx] = float("-inf")
    return scores


def _is_time_to_look(position: int, device: torch.device) -> bool:
    """Whether to ask if all sequences are finished: elsewhere than on the CPU the host would wait for the answer."""
    return device.type == "cpu" or position % 8 == 7


def _longest(written: Tensor, padding_idx: int) -> int:
    """Of the rows (N, L); padding stands at the end only."""
    return int((written != padding_idx).any(0).sum())


def _supported(layer: nn.Module) -> nn.TransformerDecoderLayer:
    """The layer, whose parts the cache runs one by one: it must do what torch.nn's does."""
    if type(layer) not in (nn.TransformerDecoderLayer, torch.nn.TransformerDecoderLayer):
        raise TypeError(
            f"a cache needs layers that are exactly nn.TransformerDecoderLayer; got {type(layer).__name__}: use cache=None"
        )
    if has_hooks(layer) or layer.__dict__.keys() & {"forward", "_sa_block", "_mha_block"}:
        raise TypeError("a layer is hooked or replaced in part, which a cache would pass over: use cache=None")
    for name in ("self_attn", "multihead_attn"):
        part = layer.get_submodule(name)
        if not _is_called_plainly(part, nn.MultiheadAttention, torch.nn.MultiheadAttention):
            raise TypeError(
                f"a layer's {name}, a {type(part).__name__}, is wrapped, hooked or replaced, which a cache would pass over: "
                "use cache=None"
            )
        if part.bias_k is not None or part.add_zero_attn or part.in_proj_weight is None or not part.batch_first:
            raise TypeError(
                f"a layer's {name} has add_bias_kv, add_zero_attn, a kdim or vdim of its own, or batch_first=False, "
                "which a cache does not know: use cache=None"
            )
    return layer  # type: ignore[return-value]


def _is_called_plainly(part: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a call of it is the forward of one of these classes and no more."""
    forward = type(part).forward
    return any(forward is kind.forward for kind in kinds) and not has_hooks(part) and "forward" not in part.__dict__


def _projected(attention: torch.nn.MultiheadAttention, x: Tensor, first: int, last: int) -> list[Tensor]:
    """x (N, L, C) through the projections [first, last) of query, key and value -> (N, L, H, E) each."""
    rows = slice(first * attention.embed_dim, last * attention.embed_dim)
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[rows]
    projected = F.linear(x, attention.in_proj_weight[rows], bias)
    heads = (attention.num_heads, attention.head_dim)
    return [part.unflatten(-1, heads) for part in projected.chunk(last - first, -1)]
