"""Batch-invariant GEMM for PyTorch: the same bits for a row alone and in a batch, on CPU, on CUDA and in `bi_jax`."""

from bi_torch.gemm.api import addmm, baddbmm, bmm, linear, matmul, mm

__all__ = ["addmm", "baddbmm", "bmm", "linear", "matmul", "mm"]
