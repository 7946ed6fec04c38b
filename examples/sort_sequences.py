"""Learn to sort: an encoder reads a sequence of numbers, a decoder writes the same numbers in order.

    python examples/sort_sequences.py        # half a minute on one CPU core

Everything of the transformer is at work: embeddings with positions, padding masks (sequences differ in length), self-attention,
causal masks, cross-attention, linear and softmax, and at the end greedy decoding with a key/value cache.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from detr_fast import nn
from detr_fast.models import Seq2Seq, TextSource

PADDING, BOS, EOS, NUMBERS = 0, 1, 2, 10  # numbers 0 to 9 are tokens 3 to 12
VOCABULARY = 3 + NUMBERS
LONGEST = 8


def draw(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sources (batch, 8) of one to eight numbers, and what they become (batch, 9): sorted, eos; both filled up with padding."""
    lengths = torch.randint(1, LONGEST + 1, (batch, 1), device=device)
    slots = torch.arange(LONGEST + 1, device=device)
    numbers = torch.randint(3, VOCABULARY, (batch, LONGEST), device=device)
    source = numbers.where(slots[:-1] < lengths, PADDING)
    ordered = numbers.where(slots[:-1] < lengths, VOCABULARY).sort(1).values
    target = nn.functional.pad(ordered, (0, 1)).where(slots < lengths, PADDING)
    return source, target.where(slots != lengths, EOS)


def build() -> Seq2Seq:
    source = TextSource(nn.TokenEmbedding(VOCABULARY, 64, padding_idx=PADDING, scaled=True))
    return Seq2Seq(
        source,
        VOCABULARY,
        d_model=64,
        nhead=4,
        num_encoder_layers=1,
        num_decoder_layers=2,
        dim_feedforward=128,
        dropout=0.0,
        norm_first=True,
        padding_idx=PADDING,
        bos_idx=BOS,
        eos_idx=EOS,
    )


def train(model: Seq2Seq, steps: int, batch: int = 128) -> None:
    device = model.head.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        loss = model(*draw(batch, device), return_loss=True)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)


def exact(model: Seq2Seq, count: int = 2000) -> float:
    """Which share of new sequences comes out exactly right, every token of it."""
    source, target = draw(count, model.head.weight.device)
    written = model.generate(source, max_length=LONGEST + 1)
    written = nn.functional.pad(written, (0, target.shape[1] - written.shape[1]), value=PADDING)
    return (written == target).all(1).float().mean().item()


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    model = build().to(options.device)
    train(model, options.steps)
    share = exact(model)
    print(f"exactly sorted: {share:.2%} of 2,000 new sequences")
    source, _ = draw(3, torch.device(options.device))
    for numbers, ordered in zip(source, model.generate(source, max_length=LONGEST + 1)):
        print(*[t.item() - 3 for t in numbers if t > EOS], "->", *[t.item() - 3 for t in ordered if t > EOS])
    return share


if __name__ == "__main__":
    main()
