"""Read handwritten digits: scikit-learn's 1,797 real 8×8 images through patches, a transformer encoder, linear and softmax.

    python examples/digits.py        # half a minute on one CPU core

Needs scikit-learn. A fifth of the images, drawn evenly over the digits, is held out and never trained on.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from detr_fast import nn


class DigitReader(nn.Module):
    """Patches of 4×4 pixels that overlap by half are the tokens; their mean after the encoder tells the digit."""

    def __init__(self, d_model: int = 64) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.PatchEmbedding(1, d_model, patch_size=4, stride=2, padding=1, flatten=False),  # (N, 4, 4, C)
            nn.LearnedPositionalEmbedding((4, 4), d_model),
            nn.Flatten(1, 2),  # (N, 16, C)
        )
        layer = nn.TransformerEncoderLayer(d_model, 4, 2 * d_model, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(d_model), enable_nested_tensor=False)
        self.head = nn.LinearSoftmax(d_model, 10)

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(self.embed(images)).mean(1)

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 1, 8, 8) in [0, 1] -> probabilities (N, 10)."""
        return self.head(self.features(images))


def load(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and digits, held-out images and digits."""
    digits = load_digits()
    parts = train_test_split(
        digits.images / 16, digits.target, test_size=0.2, stratify=digits.target, random_state=seed
    )
    images, held_out, labels, held_out_labels = (torch.from_numpy(part) for part in parts)
    return images[:, None].float(), labels, held_out[:, None].float(), held_out_labels


def shifted(images: Tensor) -> Tensor:
    """Half of the images moved by up to a pixel each way, as another hand might have placed them."""
    count, _, height, width = images.shape
    start = torch.randint(3, (2, count, 1), device=images.device)
    start[:, torch.rand(count, device=images.device) < 0.5] = 1
    row, column = (first + torch.arange(size, device=images.device) for first, size in zip(start, (height, width)))
    image = torch.arange(count, device=images.device)[:, None, None]
    return nn.functional.pad(images, (1, 1, 1, 1))[image, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)


def train(model: DigitReader, images: Tensor, labels: Tensor, epochs: int, batch: int = 64) -> None:
    steps = len(images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps, pct_start=0.1)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(images), device=images.device)
        for chosen in order[: steps * batch].view(steps, batch):
            features = model.features(shifted(images[chosen]))
            loss = model.head.loss(features, labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 0:
            print(f"epoch {epoch:3d}  loss {loss.item():.4f}", flush=True)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    images, labels, held_out, held_out_labels = (part.to(options.device) for part in load(options.seed))
    model = DigitReader().to(options.device)
    train(model, images, labels, options.epochs)
    model.eval()
    with torch.no_grad():
        accuracy = (model(held_out).argmax(-1) == held_out_labels).float().mean().item()
    print(f"read correctly: {accuracy:.2%} of {len(held_out)} held-out images")
    return accuracy


if __name__ == "__main__":
    main()
