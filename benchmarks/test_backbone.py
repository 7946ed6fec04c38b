"""ResNet-50 with frozen norms, forward and backward in bf16: channels last beside norms folded into the convolutions.

python -m pytest benchmarks/test_backbone.py          # needs a GPU
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare
from detr_fast import use_backend

pytestmark = NEEDS_GPU

IMAGES = sized((4, 800, 1066), (1, 32, 48))
NAME = sized("resnet50", "resnet18")
OPS = ("channel_affine", "resnet_stem")


def test_backbone() -> None:
    pytest.importorskip("torchvision")
    from detr_fast.models.backbone import ResNetBackbone

    torch.manual_seed(0)
    batch, height, width = IMAGES
    body = ResNetBackbone(NAME).body.to(DEVICE)
    for name, buffer in body.named_buffers():  # norms that do something
        buffer.uniform_(0.5, 1.0) if name.endswith(("weight", "running_var")) else buffer.normal_(0, 0.2)
    folded, exact = copy.deepcopy(body), copy.deepcopy(body).double()
    folded.get_submodule("maxpool").register_forward_hook(
        lambda *_: None
    )  # a part that is listened to: each convolution by itself
    images = torch.randn(batch, 3, height, width, device=DEVICE)
    with torch.no_grad():
        dy = torch.randn_like(body(images))

    def step(module: torch.nn.Module, x: Tensor = images) -> Callable[[], list[Tensor]]:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

        def run() -> list[Tensor]:
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=x.dtype != torch.float64):
                y = module(x)
            return [y, *torch.autograd.grad(y, trained, dy.to(y.dtype))]

        return run

    def asked(backend: str, bottlenecks: str = "auto") -> Callable[[], list[Tensor]]:
        run = step(body)

        def by_name() -> list[Tensor]:
            with use_backend(**dict.fromkeys(OPS, backend), bottlenecks=bottlenecks):
                return run()

        return by_name

    peers = {
        "auto": step(body),
        "triton": asked("triton"),
        "triton, each part a node": asked("triton", "eager"),
        "triton, each stage a node": asked("triton", "one_node"),
        "triton, products, too": asked("triton", "kernels"),
        "eager, channels last": asked("eager"),
        "folded": step(folded),
    }
    case = f"{NAME}, {batch} × {height}×{width}, bf16, forward and backward"
    claims = [Claim("backbone: over norms folded into convolutions", ("folded",), 1.0)]
    compare(case, peers, eager=step(folded), truth=step(exact, images.double()), claims=claims)
