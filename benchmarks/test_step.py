"""A DETR-R50 training step beside Hugging Face's, eager and compiled, with equal settings. A wrong model is never timed.

    python -m pytest benchmarks/test_step.py          # needs a GPU

Forward in bf16 autocast, auxiliary losses and dropout on, matching, backward, clipping, AdamW; 4 images of 800×1066 with 8
objects each. "auto" is what `detr-fast train` runs: our model in a captured step; "packed": its encoder skips padding; "Hugging Face's": theirs,
accelerated, in a captured step or launched eagerly. All start from the same random weights.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import detr_fast
from benchmarks.hardware import NEEDS_GPU, REHEARSAL, sized
from benchmarks.libraries import library
from benchmarks.timing import CHECK_ONLY, Claim, NotInstalled, compare, record
from detr_fast.engine.captured import CapturedStep
from detr_fast.models import ModelConfig, Targets, build_criterion, build_model
from detr_fast.models.convert import Weights, load_weights
from detr_fast.models.structures import NestedTensor
from detr_fast.models.weight_names import from_huggingface

pytestmark = NEEDS_GPU

CLASSES, BATCH = 91, 4
PEERS = sized(("auto", "auto, packed", "uncaptured", "huggingface"), ("auto", "auto, packed"))
# What `accelerate` makes of theirs: with our loss in place of theirs, which makes the host wait, it can be captured.
ACCELERATED = ("auto, Hugging Face's", "auto, Hugging Face's, uncaptured")
COMPILED = sized(
    (*PEERS, *ACCELERATED, "torch.compile"), (ACCELERATED[0], "torch.compile")
)  # which takes some minutes to compile


class Pair:
    """The same detector twice: ours and, where transformers is installed, Hugging Face's; on one batch."""

    def __init__(self, device: str, size: tuple[int, int] = (800, 1066), batch: int = BATCH, **smaller: int) -> None:
        layers = smaller.get("layers", 6)
        self.config = ModelConfig(
            num_classes=CLASSES,
            encoder_layers=layers,
            decoder_layers=layers,
            feedforward=smaller.get("feedforward", 2048),
        )
        torch.manual_seed(0)
        self.ours = build_model(self.config).to(device)
        self.device = torch.device(device)
        self.autocast = partial(torch.autocast, self.device.type, dtype=torch.bfloat16)
        self.images = torch.randn(batch, 3, *size, device=device)
        self.mask = torch.zeros(batch, *size, dtype=torch.bool, device=device)
        self.mask[1:, :, size[1] - size[1] // 4 :] = True  # padding on the right, as in a batch of mixed sizes
        self.boxes = torch.rand(batch, 8, 4, device=device) * 0.3 + 0.3
        self.labels = torch.randint(CLASSES, (batch, 8), device=device)

    @functools.cached_property
    def peer(self) -> Any:
        """Hugging Face's, made when it is first asked for; ours takes over its random weights."""
        transformers = library("transformers")
        config = transformers.DetrConfig(
            use_timm_backbone=False,
            backbone_config=transformers.ResNetConfig(out_features=["stage4"]),
            num_labels=CLASSES,
            attention_dropout=self.config.dropout,
            activation_dropout=self.config.dropout,
            auxiliary_loss=True,
            encoder_layers=self.config.encoder_layers,
            decoder_layers=self.config.decoder_layers,
            encoder_ffn_dim=self.config.feedforward,
            decoder_ffn_dim=self.config.feedforward,
        )
        peer = transformers.DetrForObjectDetection(config).to(self.device)
        # transformers 5 means to train them, as the original does, but looks for "stage.1" where its ResNet says "stages.1",
        # and so freezes the whole backbone.
        for stage in peer.model.backbone.model.encoder.stages[1:]:
            stage.requires_grad_(True)
        load_weights(self.ours, Weights(from_huggingface(peer.state_dict())))
        return peer

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

    def captured_step(self, capture: bool, packed: bool = False) -> CapturedStep:
        """Our training step; packed: the encoder skips padding."""
        self.ours.packed = packed
        optimizer = torch.optim.AdamW([p for p in self.ours.parameters() if p.requires_grad], lr=1e-4, fused=True)
        criterion = build_criterion(self.config).to(self.device)
        return CapturedStep(self.ours, criterion, optimizer, clip_norm=0.1, autocast=self.autocast, capture=capture)

    def step_of(self, captured: CapturedStep) -> Callable[[], Tensor]:
        counts = torch.full((len(self.boxes),), 8, device=self.device)
        targets = Targets(self.boxes, self.labels, counts)
        height, width = self.mask.shape[1:]
        sizes = tuple((height, width - width // 4 * bool(number)) for number in range(len(self.mask)))
        return lambda: captured(NestedTensor(self.images, self.mask, sizes=sizes), targets)["loss_ce"]

    def step(self, which: str) -> Callable[[], Tensor]:
        """A call that takes one training step and returns the loss, on the device."""
        if which not in ("huggingface", "torch.compile", *ACCELERATED):
            return self.step_of(self.captured_step(which != "uncaptured", packed=which == "auto, packed"))
        module = self.peer
        if which in ACCELERATED:
            module = copy.deepcopy(module)
            detr_fast.accelerate(module)
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        called = torch.compile(module) if which == "torch.compile" else module
        labels = [{"class_labels": c, "boxes": b} for c, b in zip(self.labels, self.boxes)]
        visible = (~self.mask).long()
        if which in ACCELERATED:
            return self.accelerated_step(module, optimizer, visible, labels, capture="uncaptured" not in which)

        def step() -> Tensor:
            with self.autocast():
                loss = called(self.images, pixel_mask=visible, labels=labels).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()
            return loss

        return step

    def accelerated_step(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, visible: Tensor, labels: Any, capture: bool
    ) -> Callable[[], Tensor]:
        loss_of: Callable[[Any, Any], Tensor] = lambda outputs, _: outputs.loss  # noqa: E731
        step = CapturedStep(module, loss_of, optimizer, clip_norm=0.1, autocast=self.autocast, capture=capture)

        def run() -> Tensor:
            loss = step({"pixel_values": self.images, "pixel_mask": visible, "labels": labels})["loss"]
            assert step.reason is None or not capture, f"Hugging Face's accelerated step: {step.reason}"
            return loss

        return run


def trained(model: torch.nn.Module) -> int:
    """How many numbers it trains."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def check(pair: Pair) -> None:
    """Both must train as much and find the same before either is timed; TF32's convolutions would round each its own way."""
    ours, theirs = trained(pair.ours), trained(pair.peer)
    assert ours == theirs, f"we train {ours:,} numbers, and Hugging Face's model {theirs:,}: not timed"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found, expected = pair.logits()
    error = (found - expected).norm() / expected.norm()
    assert error < 1e-3, f"our logits differ from Hugging Face's (relative error {error:.2e}): not timed"


def checked_pair() -> Pair:
    pair = sized(partial(Pair, "cuda"), partial(Pair, "cpu", size=(32, 64), batch=2, layers=1, feedforward=64))()
    with suppress(NotInstalled):  # then ours is all that is timed, with nothing here to hold it against
        check(pair)
    return pair


# Each peer has a pair of its own, but in a rehearsal.
make_pair: Callable[[], Pair] = functools.cache(checked_pair) if REHEARSAL else checked_pair


# Checked alone they compile side by side, the longest compilation first.
@pytest.mark.parametrize(
    "peers", [(peer,) for peer in reversed(PEERS)] if CHECK_ONLY else [PEERS, COMPILED], ids=" beside ".join
)
def test_training_step(peers: Sequence[str]) -> None:
    peaks: dict[str, float] = {}

    def made(peer: str) -> Callable[[], list[Tensor]]:
        pair = make_pair()
        step, before = pair.step(peer), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(sized(4, 1)):  # two warm up, the third is captured
            step()
        torch.cuda.synchronize()
        peaks[f"{peer}, GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30  # a graph's own memory, too
        return lambda: [step()]

    case = f"DETR-R50 training step, {BATCH} × 800×1066, bf16, auxiliary losses, dropout 0.1"
    steps = {peer: deferred(made, peer) for peer in peers}
    claims = [
        Claim("training step: over Hugging Face's, torch.compile", ("torch.compile",), 2.0),
        Claim("training step: over Hugging Face's, eager", ("huggingface",), 2.0),
        Claim(
            "Hugging Face's training step, accelerated and captured: over itself", ("huggingface",), 2.0, ACCELERATED[0]
        ),
    ]
    compare(case, steps, claims=claims, images=BATCH, is_graph=True)
    if not CHECK_ONLY:
        record({"peak memory of a training step, beside the model's own": peaks})


def deferred(make: Callable[[str], Callable[[], list[Tensor]]], peer: str) -> Callable[[], list[Tensor]]:
    """Makes the step on its first call, so that a peer that can't be made is a peer that fails."""
    made: list[Callable[[], list[Tensor]]] = []

    def run() -> list[Tensor]:
        if not made:
            made.append(make(peer))
        return made[0]()

    return run
