"""A DETR-R50 training step beside Hugging Face's, eager and compiled, with equal settings. A wrong model is never timed.

    python -m pytest benchmarks/test_step.py          # needs a GPU

Forward in bf16 autocast, auxiliary losses and dropout on, matching, backward, clipping, AdamW; 4 images of 800×1066 with 8
objects each. "auto" is what `detr-fast train` runs: our model in a captured step. Both start from the same random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.hardware import NEEDS_GPU, sized
from detr_fast.engine.captured import CapturedStep
from detr_fast.models import ModelConfig, Targets, build_criterion, build_model
from detr_fast.models.convert import Weights, load_weights
from detr_fast.models.structures import NestedTensor
from detr_fast.models.weight_names import from_huggingface

CLASSES = 91
PEERS = ("auto", "uncaptured", "huggingface", "torch.compile")


class Pair:
    """The same detector twice: Hugging Face's and ours, on one batch."""

    def __init__(self, device: str, size: tuple[int, int] = (800, 1066), batch: int = 4, **smaller: int) -> None:
        transformers = pytest.importorskip("transformers")
        layers: dict[str, Any] = {
            "encoder_layers": smaller.get("layers", 6),
            "decoder_layers": smaller.get("layers", 6),
        }
        config = transformers.DetrConfig(
            use_timm_backbone=False,
            backbone_config=transformers.ResNetConfig(out_features=["stage4"]),
            num_labels=CLASSES,
            auxiliary_loss=True,
            **layers,
        )
        torch.manual_seed(0)
        self.peer: Any = transformers.DetrForObjectDetection(config).to(device)
        self.config = ModelConfig(num_classes=CLASSES, **layers)
        self.ours = build_model(self.config).to(device)
        load_weights(self.ours, Weights(from_huggingface(self.peer.state_dict())))
        self.device = torch.device(device)
        self.images = torch.randn(batch, 3, *size, device=device)
        self.mask = torch.zeros(batch, *size, dtype=torch.bool, device=device)
        self.mask[1:, :, size[1] - size[1] // 4 :] = True  # padding on the right, as in a batch of mixed sizes
        self.boxes = torch.rand(batch, 8, 4, device=device) * 0.3 + 0.3
        self.labels = torch.randint(CLASSES, (batch, 8), device=device)

    @torch.no_grad()
    def logits(self) -> tuple[Tensor, Tensor]:
        """Of both, without dropout."""
        self.peer.eval()
        self.peer.config.auxiliary_loss = False
        theirs = self.peer(self.images, pixel_mask=(~self.mask).long()).logits
        self.peer.config.auxiliary_loss = True
        ours = self.ours.eval()((self.images, self.mask))["pred_logits"]
        self.peer.train()
        self.ours.train()
        return ours, theirs

    def step(self, which: str) -> Callable[[], Tensor]:
        """A call that takes one training step and returns the loss, on the device."""
        module = self.ours if which in ("auto", "uncaptured") else self.peer
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        autocast = partial(torch.autocast, self.device.type, dtype=torch.bfloat16)
        if module is self.ours:
            criterion = build_criterion(self.config).to(self.device)
            captured = CapturedStep(
                module, criterion, optimizer, clip_norm=0.1, autocast=autocast, capture=which == "auto"
            )
            counts = torch.full((len(self.boxes),), 8, device=self.device)
            targets = Targets(self.boxes, self.labels, counts)
            return lambda: captured(NestedTensor(self.images, self.mask), targets)["loss_ce"]
        called = torch.compile(module) if which == "torch.compile" else module
        labels = [{"class_labels": c, "boxes": b} for c, b in zip(self.labels, self.boxes)]
        visible = (~self.mask).long()

        def step() -> Tensor:
            with autocast():
                loss = called(self.images, pixel_mask=visible, labels=labels).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()
            return loss

        return step


def check(pair: Pair) -> None:
    """Both must find the same before either is timed."""
    ours, theirs = pair.logits()
    error = (ours - theirs).norm() / theirs.norm()
    assert error < 1e-3, f"our logits differ from Hugging Face's (relative error {error:.2e}): not timed"


@pytest.mark.parametrize("peer", [pytest.param(peer, marks=NEEDS_GPU) for peer in PEERS])
def test_training_step(benchmark: Any, peer: str) -> None:
    benchmark.group = "DETR-R50 training step, 4 × 800×1066, bf16, auxiliary losses, dropout 0.1"
    pair = sized(lambda: Pair("cuda"), lambda: Pair("cpu", size=(64, 96), batch=2, layers=1))()
    check(pair)
    step = pair.step(peer)

    def synchronised() -> None:
        step()
        torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=10, iterations=1, warmup_rounds=4)
    benchmark.extra_info["peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
