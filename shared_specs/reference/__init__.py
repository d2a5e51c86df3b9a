"""The reference model: what every engine must give, bit for bit, computed slowly and plainly with NumPy."""

from shared_specs.reference.arithmetic import NumpyArithmetic
from shared_specs.reference.gemm import gemm

__all__ = ["NumpyArithmetic", "gemm"]
