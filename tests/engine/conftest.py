"""A tiny data set, a run that takes a second, and CUDA graphs emulated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from detr_fast.engine import captured
from tests import stub_cuda

# What a run needs is imported where one is made: captured steps are tested where pycocotools is missing, too.
if TYPE_CHECKING:
    from detr_fast.engine.config import TrainConfig


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from detr_fast.data.scenes import generate_scenes

    return generate_scenes(tmp_path_factory.mktemp("tiny") / "scenes", train=12, val=4, size=40)


@pytest.fixture
def tiny(scenes: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """tiny(name="run", **changes): the settings of a run in tmp_path / name: 3 steps an epoch."""
    from detr_fast.data.transforms import TransformConfig
    from detr_fast.engine.config import TrainConfig
    from detr_fast.models.build import ModelConfig

    def config(name: str = "run", **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "data": str(scenes),
            "run": str(tmp_path / name),
            "model": ModelConfig(
                backbone="conv",
                num_queries=6,
                d_model=16,
                heads=2,
                encoder_layers=1,
                decoder_layers=2,
                feedforward=16,
                backbone_width=4,
            ),
            "transforms": TransformConfig(sizes=(32, 40), max_size=64, crop=True, eval_size=40),
            "epochs": 2,
            "batch_size": 4,
            "lr": 1e-3,
            "device": "cpu",
            "workers": 0,
            "log_every": 1,
            "ema_decay": 0.9,
        }
        return TrainConfig(**values | changes)

    return config


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """CUDA's graph functions, emulated on the CPU; the value holds the graphs that were captured."""
    made: list[SimpleNamespace] = []

    @contextlib.contextmanager
    def record(graph, pool, stream, capture_error_mode):
        made.append(SimpleNamespace(graph=graph, pool=pool, mode=capture_error_mode))
        with stub_cuda.captured(graph):
            yield

    for name, value in {**stub_cuda.stubs(), "graph": record}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(captured, "why_no_graph", lambda *_: None)
    return made
