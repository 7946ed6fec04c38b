"""DDP and FSDP2 on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def test_an_accelerated_model_trains_under_ddp_and_fsdp2_as_in_one_process(tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output
        assert "data_parallel as in one process" in output
        assert "fully_sharded as in one process" in output
        assert "sharded_by_layer as in one process" in output
        if find_spec("transformers") and find_spec("accelerate") and find_spec("scipy"):
            assert "detection_loss as transformers'" in output
