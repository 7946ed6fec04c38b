"""Accelerate a Hugging Face DETR: three lines, marked below, and the printed report.

    python examples/accelerate_hugging_face_detr.py            # random weights, small, no network
    python examples/accelerate_hugging_face_detr.py --resnet50 # the size of facebook/detr-resnet-50, random weights

With weights from the hub, replace `build()` by DetrForObjectDetection.from_pretrained("facebook/detr-resnet-50").
"""

from __future__ import annotations

import argparse

import torch
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

SMALL = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_queries": 20,
}


def build(small: bool) -> DetrForObjectDetection:
    """A DETR with random weights."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]} if small else {}
    backbone = ResNetConfig(out_features=["stage4"], **sizes)
    config = DetrConfig(use_timm_backbone=False, backbone_config=backbone, **(SMALL if small else {}))
    return DetrForObjectDetection(config).eval()


def batch(device: str) -> dict[str, torch.Tensor]:
    """Two images; the second one is smaller and padded, as DetrImageProcessor pads."""
    pixels = torch.rand(2, 3, 160, 224, device=device)
    mask = torch.ones(2, 160, 224, dtype=torch.long, device=device)
    mask[1, 120:], mask[1, :, 160:] = 0, 0
    return {"pixel_values": pixels * mask[:, None], "pixel_mask": mask}


def main() -> None:
    parser = argparse.ArgumentParser(description="Accelerate a Hugging Face DETR and print what was switched and why")
    parser.add_argument("--resnet50", action="store_true", help="the size of facebook/detr-resnet-50")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, inputs = build(small=not arguments.resnet50).to(device), batch(device)
    with torch.no_grad():
        before = model(**inputs)

    import detr_fast  # 1

    report = detr_fast.accelerate(model, example_inputs=inputs)  # 2
    print(report)  # 3

    with torch.no_grad():
        after = model(**inputs)
    difference = (after.pred_boxes - before.pred_boxes).abs().max().item()
    print(f"largest difference of a box coordinate before and after: {difference:.1e}")
    if difference > 1e-4:
        raise SystemExit("the accelerated model differs: please report it")
    detr_fast.restore(model)


if __name__ == "__main__":
    main()
