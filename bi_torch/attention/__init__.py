"""Attention under the contract of `shared_specs.attention`, fused on a GPU, or composed of products and row programs."""

from bi_torch.attention.api import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
