"""Runs the PTX that Triton compiles for sm_80 on a CPU."""

from detr_fast.testing.ptx.driver import emulated_gpu as emulated_gpu
