"""GEMM for PyTorch.

`api` is public, `library` registers the op, `cpu` and `cuda` compute it, `triton_kernels` is the GPU code.
"""
