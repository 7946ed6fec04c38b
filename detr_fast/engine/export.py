"""A detector as one file that runs without detr-fast: torch.export's program, pixels in and detections out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from detr_fast.engine.errors import EngineError
from detr_fast.engine.run_folder import atomic_write
from detr_fast.engine.trained import TrainedModel
from detr_fast.models.detr import Detr
from detr_fast.models.postprocess import PostProcess

ABOUT = "detr_fast.json"  # in the file: names and category ids by label, and the size that evaluation uses
MULTIPLE = 32  # of which height and width must be multiples; the mask says what is padding
LONGEST = 128 * MULTIPLE


class Exported(nn.Module):
    """What is exported: normalises, detects, and reads the scores. See `export_detector`."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Detr) -> None:
        super().__init__()
        self.model = model
        self.post_process = PostProcess(model.focal)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels = ((images - self.mean) / self.std).masked_fill(mask[:, None], 0.0)  # training pads what is normalised
        return self.post_process.read(self.model((pixels, mask)))


def export_detector(trained: TrainedModel, path: str | Path) -> torch.export.ExportedProgram:
    """Write `trained` into `path` as a program of PyTorch's own operations, for any number and size of images.

    The program takes images (B, 3, H, W), RGB from 0 to 1, H and W multiples of 32, and a mask (B, H, W), True = padding.
    It gives scores (B, Q), labels (B, Q) and boxes (B, Q, 4): x0, y0, x1, y1 as shares of each unpadded image's size.
    `torch.export.load(path).module()` runs it, on the device that the model is on now.

    Raises:
        EngineError: what was exported computes something else than the model.
        RunFolderError: the file cannot be written.
    """
    module = Exported(trained.model).to(next(trained.model.parameters()).device).eval()
    batch, rows, columns = (torch.export.Dim(n, min=1, max=LONGEST // MULTIPLE) for n in ("batch", "rows", "columns"))
    height, width = MULTIPLE * rows, MULTIPLE * columns
    shapes = {"images": {0: batch, 2: height, 3: width}, "mask": {0: batch, 1: height, 2: width}}
    with torch.no_grad():
        program = torch.export.export(module, _example(module, 2, 4, 5), dynamic_shapes=shapes)
        other = _example(module, 3, 3, 2)  # neither number nor size is that of the example above
        for name, ours, theirs in zip(("scores", "labels", "boxes"), module(*other), program.module()(*other)):
            if not torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-4) and name != "labels":
                raise EngineError(f"the exported program's {name} differ from the model's; please report this")
    about = {"names": trained.names, "category_ids": trained.category_ids, "size": trained.config.transforms.eval_size}
    atomic_write(Path(path), lambda file: torch.export.save(program, file, extra_files={ABOUT: json.dumps(about)}))
    return program


def _example(module: Exported, number: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Images of noise, the last of them padded by a quarter of its width."""
    height, width = rows * MULTIPLE, columns * MULTIPLE
    images = torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(0)).to(module.mean.device)
    mask = torch.zeros(number, height, width, dtype=torch.bool, device=images.device)
    mask[-1, :, width - width // 4 :] = True
    return images, mask
