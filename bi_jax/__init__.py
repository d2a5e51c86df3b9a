"""Batch-invariant operations for JAX, with the same bits as `bi_torch` and on a CPU."""

from bi_jax.gemm import addmm, baddbmm, bmm, linear, matmul, mm, workspace_bytes

__all__ = ["addmm", "baddbmm", "bmm", "linear", "matmul", "mm", "workspace_bytes"]
