"""What all rooms' tests share: the two kinds of process, the data set of real images, no stray overrides."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("interpreter") and not INTERPRETING:
            item.add_marker(
                pytest.mark.skip(reason="runs in Triton's interpreter: set TRITON_INTERPRET=1 (make test does)")
            )
        if item.get_closest_marker("offline") and INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="offline compilation fails while TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True)
def _repeatable():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def bccd() -> Path:
    """The folder of real blood-cell micrographs; a test that needs it is skipped, saying so, where it is absent."""
    places = [os.environ.get("DETR_FAST_BCCD"), Path(__file__).parents[2] / "shared" / "data" / "bccd"]
    for place in places:
        if place and (Path(place) / "instances_train.json").is_file():
            return Path(place)
    pytest.skip("the BCCD data set is not here: set DETR_FAST_BCCD to its folder (instances_*.json and images/)")
