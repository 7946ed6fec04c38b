"""Sequence to sequence: an encoder over text or an image, and a decoder that writes tokens.

Source: Vaswani et al., 2017, arXiv:1706.03762.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast import nn
from detr_fast.models import decoding


class TextSource(nn.Module):
    """Token ids, embedded, with their positions.

    Args:
        embedding: of the ids; its padding index is what the encoder and the decoder do not see.
        position: adds positions; None: sines.
    """

    def __init__(self, embedding: nn.TokenEmbedding, position: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        self.position = nn.SinusoidalPositionalEncoding(embedding.embedding_dim) if position is None else position

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """tokens (N, S), mask (N, S) with True = padding, None: by the padding index -> (N, S, C) and the mask."""
        if tokens.ndim != 2:
            raise ValueError(f"a TextSource takes token ids (N, S); got {tuple(tokens.shape)}")
        mask = self.embedding.padding_mask(tokens) if mask is None else mask
        return self.position(self.embedding(tokens)), mask


class ImageSource(nn.Module):
    """Images, or a backbone's feature maps, as tokens with their positions.

    Args:
        embedding: PatchEmbedding or PixelEmbedding with flatten=False.
        position: adds positions to (N, H, W, C): SinePositionEmbedding2D, which sees the mask, or another.
    """

    def __init__(self, embedding: nn.PatchEmbedding | nn.PixelEmbedding, position: nn.Module) -> None:
        super().__init__()
        if embedding.flatten:
            raise ValueError(f"positions on a grid need {type(embedding).__name__}(…, flatten=False)")
        self.embedding = embedding
        self.position = position

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """images (N, channels, H, W), mask (N, H, W) with True = padding -> tokens (N, S, C) and their mask (N, S)."""
        tokens = self.embedding(images)
        if mask is None:
            return self.position(tokens).flatten(1, 2), None
        mask = self.embedding.token_mask(mask)
        sees_mask = isinstance(self.position, nn.SinePositionEmbedding2D)
        tokens = self.position(tokens, mask) if sees_mask else self.position(tokens)
        return tokens.flatten(1, 2), mask.flatten(1)


class Seq2Seq(nn.Module):
    """A transformer that writes tokens about a source.

    The decoder's layers each take the previous one's output, and keys and values from the encoder's last. It starts from the
    targets shifted by one, hidden from what comes after; or from `queries`, which it fills all at once.

    Args:
        source: embeds sources: TextSource, ImageSource, or any module (source, mask) -> (N, S, C) and a mask (N, S) or None.
        vocabulary: V, the number of target tokens, the special ones included.
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, norm_first: torch.nn.Transformer's.
        position: of the decoder's inputs, called with them and the position of the first; None: sines.
        queries: what the decoder starts from; None: shifted targets.
        padding_idx, bos_idx, eos_idx: targets end with eos and are filled up with padding, which is not learned; bos is what
            the first target is predicted from.

    Attributes:
        source, target, position, queries, encoder, decoder, head: the parts. `head.weight = target.weight` ties the two.

    Raises:
        ValueError: special tokens outside the vocabulary, or an eos that could not be told from the others.
    """

    def __init__(
        self,
        source: nn.Module,
        vocabulary: int,
        d_model: int = 256,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 1024,
        dropout: float = 0.1,
        *,
        norm_first: bool = False,
        position: nn.Module | None = None,
        queries: nn.DecoderQueries | None = None,
        padding_idx: int = 0,
        bos_idx: int = 1,
        eos_idx: int = 2,
    ) -> None:
        super().__init__()
        special = {"padding_idx": padding_idx, "bos_idx": bos_idx, "eos_idx": eos_idx}
        if not all(0 <= index < vocabulary for index in special.values()):
            raise ValueError(f"special tokens must lie in [0, {vocabulary}), the vocabulary; got {special}")
        if eos_idx in (padding_idx, bos_idx):
            raise ValueError(f"eos_idx must be a token of its own; got {special}")
        self.padding_idx, self.bos_idx, self.eos_idx = padding_idx, bos_idx, eos_idx
        self.source = source
        self.target = nn.TokenEmbedding(vocabulary, d_model, padding_idx, scaled=True)
        self.position = nn.SinusoidalPositionalEncoding(d_model) if position is None else position
        self.queries = queries
        self.dropout = nn.Dropout(dropout)
        settings = (d_model, nhead, dim_feedforward, dropout)
        encoder_layer = nn.TransformerEncoderLayer(*settings, norm_first=norm_first, batch_first=True)
        decoder_layer = nn.TransformerDecoderLayer(*settings, norm_first=norm_first, batch_first=True)
        norms = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.encoder = nn.TransformerEncoder(encoder_layer, num_encoder_layers, norms[0], enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder_layer, num_decoder_layers, norms[1])
        self.head = nn.LinearSoftmax(d_model, vocabulary)
        for stack in (self.encoder, self.decoder):  # the stacks copy one layer: without this all would start the same
            for parameter in stack.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_mask: Tensor | None = None,
        *,
        return_loss: bool = False,
    ) -> Tensor:
        """Logits for each target, or their mean cross-entropy.

        Args:
            source: what `source` takes: ids (N, S), images (N, channels, H, W), …
            target: (N, L), the tokens to write, with eos, without bos. A model with queries needs them for the loss only,
                and has L = Q.
            source_mask: (N, S) or (N, H, W) bool, True = padding.
            return_loss: without the logits, which need not be kept then. Padding does not count.

        Returns:
            logits (N, L, V), the i-th of which predicts target i; or a scalar
        """
        if target is None and (return_loss or self.queries is None):
            reason = "return_loss=True" if self.queries is not None else "a Seq2Seq without queries"
            raise ValueError(f"{reason} needs targets (N, L); to write tokens, call generate or beam_search")
        memory, padding = self.encode(source, source_mask)
        if self.queries is not None:
            features = self._fill_queries(memory, padding)
        else:
            assert target is not None
            if len(target) != len(memory):
                raise ValueError(f"got {len(memory)} sources but {len(target)} targets; expected as many")
            features = self.decode(nn.shift_right(target, self.bos_idx), memory, padding)
        if not return_loss:
            return self.head.logits(features)
        assert target is not None
        return self.head.loss(features, target, ignore_index=self.padding_idx)

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The encoder's output (N, S, C), and its mask (N, S), True = padding."""
        tokens, padding = self.source(source, source_mask)
        if padding is not None and not padding.numel():  # no sources, or empty ones: torch.nn can't reshape such a mask
            padding = None
        return self.encoder(self.dropout(tokens), src_key_padding_mask=padding), padding

    def decode(self, inputs: Tensor, memory: Tensor, padding: Tensor | None) -> Tensor:
        """Shifted targets (N, L), an encoder's output and mask -> features (N, L, C); each sees those before it only.

        Padding at the end of the targets needs no mask of its own: nothing before it sees it.
        """
        length = inputs.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=inputs.device).triu(1)
        return self.decoder(
            self.embed(inputs), memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding
        )

    def embed(self, inputs: Tensor, start: int | Tensor = 0) -> Tensor:
        """Target ids (N, L), the first of which stands at `start` -> (N, L, C), with positions."""
        return self.dropout(self.position(self.target(inputs), start))

    def _fill_queries(self, memory: Tensor, padding: Tensor | None) -> Tensor:
        assert self.queries is not None
        inputs = self.dropout(self.position(self.queries(memory)))
        return self.decoder(inputs, memory, memory_key_padding_mask=padding)

    def generate(
        self,
        source: Tensor,
        max_length: int,
        source_mask: Tensor | None = None,
        *,
        top_k: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        cache: str | None = "growing",
    ) -> Tensor:
        """Write a sequence for each source: the likeliest token each time or, with `top_k`, one drawn from the likeliest.

        Runs without gradients and without dropout. Padding and bos are never written.

        Args:
            source, source_mask: as forward's.
            max_length: where a sequence ends that has not ended itself.
            top_k: draw from that many tokens, by their probabilities at `temperature`.
            temperature: below 1 the likelier ones come more often, above 1 less often.
            generator: to draw with; None: torch's own.
            cache: "growing"; "static", whose steps all have the same shapes; or None, which computes all anew each step.

        Returns:
            (N, L) int64, L at most max_length: each row ends with eos, if it has come to its end, and padding.
        """
        if top_k is None and (temperature != 1.0 or generator is not None):
            raise ValueError("temperature and generator are for sampling: pass top_k as well")
        choose = decoding.greedy if top_k is None else decoding.top_k_sampling(top_k, temperature, generator)
        with decoding.evaluating(self):
            return decoding.generate(self, *self._encoded(source, source_mask, max_length), max_length, choose, cache)

    def beam_search(
        self,
        source: Tensor,
        max_length: int,
        source_mask: Tensor | None = None,
        *,
        beams: int = 4,
        length_penalty: float = 0.0,
        cache: str | None = "growing",
    ) -> decoding.Beams:
        """Search for the likeliest sequences, keeping the `beams` best for each source at every step.

        Sequences are compared by log-probability / length^length_penalty, finished or not; those that are finished stay among
        the beams until better ones push them out. With as many beams as there are sequences the search is exhaustive.

        Args:
            source, source_mask, max_length, cache: as generate's.
            beams: how many to keep.
            length_penalty: 0 compares probabilities, which favours short sequences; 1 the mean per token.

        Returns:
            tokens (N, beams, L) and scores (N, beams), the best first.
        """
        with decoding.evaluating(self):
            encoded = self._encoded(source, source_mask, max_length)
            return decoding.beam_search(self, *encoded, max_length, beams, length_penalty, cache)

    def _encoded(self, source: Tensor, source_mask: Tensor | None, max_length: int) -> tuple[Tensor, Tensor | None]:
        if self.queries is not None:
            raise ValueError("a Seq2Seq with queries writes all tokens at once: call model(source).argmax(-1)")
        if max_length < 1:
            raise ValueError(f"got max_length={max_length}; expected at least 1")
        return self.encode(source, source_mask)
