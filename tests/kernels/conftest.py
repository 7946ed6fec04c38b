from __future__ import annotations

import pytest


@pytest.fixture
def interpreter():
    """Kernels run in the checked interpreter; the value tells what was launched."""
    from detr_fast.testing.interpreter import checked_interpreter

    with checked_interpreter() as checks:
        yield checks
