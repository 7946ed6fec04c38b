"""How few padded sizes a training run can do with: padding against the number of CUDA graphs, simulated.

python -m benchmarks.shape_buckets [PICTURE]      # prints the table of docs/training-step.md

The images' sizes are an assumed mixture after COCO's: 640 pixels on the longer side, mostly 4:3 and 3:2, a quarter
upright. Augmentation and grouping of batches are the library's own code, with the original's settings.
"""

from __future__ import annotations

import sys

import numpy as np

from detr_fast.data.buckets import ShapeBuckets, Size, simulate_batches
from detr_fast.data.transforms import TransformConfig

# (height, width) and its share
MIXTURE: tuple[tuple[Size, float], ...] = (
    ((480, 640), 0.36),
    ((427, 640), 0.26),
    ((640, 480), 0.13),
    ((640, 427), 0.09),
    ((640, 640), 0.04),
    ((360, 640), 0.04),
    ((640, 360), 0.02),
    ((512, 640), 0.03),
    ((640, 512), 0.03),
)
COUNTS = (1, 2, 4, 8, 12, 16, 24, 32)


def table(batch_size: int = 4, batches: int = 2000) -> list[tuple[str, int, float]]:
    """(what, number of sizes, share of pixels that are padding beyond the batches' own sizes), on batches not fitted to."""
    shares = np.array([share for _, share in MIXTURE])
    drawn = np.random.default_rng(0).choice(len(MIXTURE), 4000, p=shares / shares.sum())
    images = [MIXTURE[index][0] for index in drawn]
    fitted = simulate_batches(images, TransformConfig(), batch_size, batches, seed=1)
    seen = simulate_batches(images, TransformConfig(), batch_size, batches, seed=2)
    rows = []
    for divisor in (32, 64, 128, 256):
        rounded = [tuple(-(-length // divisor) * divisor for length in size) for size in seen]
        waste = 1 - sum(h * w for h, w in seen) / sum(h * w for h, w in rounded)
        rows.append((f"multiples of {divisor}", len(set(rounded)), waste))
    for count in COUNTS:
        buckets = ShapeBuckets.fit(fitted, count)
        rows.append(("fitted", len(buckets.sizes), buckets.waste(seen)))
    return rows


def draw(rows: list[tuple[str, int, float]], path: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3))
    for label, chosen in (("fitted", True), ("rounded up to multiples", False)):
        points = [(number, 100 * waste) for what, number, waste in rows if (what == "fitted") == chosen]
        axes.plot(*zip(*points), marker="o", label=label)
    axes.set(xscale="log", xlabel="CUDA graphs (padded sizes)", ylabel="padding added, % of pixels", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    results = table()
    print("| sizes | graphs | padding added |\n|---|---|---|")
    for name, number, share in results:
        print(f"| {name} | {number} | {100 * share:.1f} % |")
    if len(sys.argv) > 1:
        draw(results, sys.argv[1])
