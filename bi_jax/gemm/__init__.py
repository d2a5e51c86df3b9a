"""GEMM under the contract of `shared_specs`."""

from bi_jax.gemm.api import addmm, baddbmm, bmm, linear, matmul, mm
from bi_jax.gemm.mosaic import workspace_bytes

__all__ = ["addmm", "baddbmm", "bmm", "linear", "matmul", "mm", "workspace_bytes"]
