"""Tensors between PyTorch and JAX without a copy: the only place where both frameworks meet."""

from bi_bridge.dlpack import to_jax, to_torch, tree_to_jax, tree_to_torch

__all__ = ["to_jax", "to_torch", "tree_to_jax", "tree_to_torch"]
