"""Attention under the contract of `shared_specs.attention`, composed of products and row programs."""

from bi_jax.attention.api import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
