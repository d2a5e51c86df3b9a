"""A Llama-style decoder, once in PyTorch with bi_torch and once in JAX with bi_jax, side by side."""
