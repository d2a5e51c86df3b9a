"""Batch-invariant operations for JAX, with the same bits as `bi_torch` and on a CPU."""

from bi_jax.attention import scaled_dot_product_attention
from bi_jax.gemm import addmm, baddbmm, bmm, linear, matmul, mm, workspace_bytes
from bi_jax.rows.embedding import embedding
from bi_jax.rows.norm import fused_add_rms_norm, layer_norm, rms_norm
from bi_jax.rows.optimizer import adamw, clip_by_global_norm, sgd
from bi_jax.rows.pointwise import (
    cos,
    erf,
    exp,
    gelu,
    log,
    rotary_embedding,
    rotary_tables,
    rsqrt,
    sigmoid,
    silu,
    silu_mul,
    sin,
    tanh,
)
from bi_jax.rows.reduce import amax, amin, logsumexp, mean, sum, var  # noqa: A004
from bi_jax.rows.softmax import cross_entropy, log_softmax, softmax, token_logprobs
from bi_jax.transform import UncoveredOperationError, UncoveredOperationWarning, batch_invariant, explain

__all__ = [
    "UncoveredOperationError",
    "UncoveredOperationWarning",
    "adamw",
    "addmm",
    "amax",
    "amin",
    "baddbmm",
    "batch_invariant",
    "bmm",
    "clip_by_global_norm",
    "cos",
    "cross_entropy",
    "embedding",
    "erf",
    "exp",
    "explain",
    "fused_add_rms_norm",
    "gelu",
    "layer_norm",
    "linear",
    "log",
    "log_softmax",
    "logsumexp",
    "matmul",
    "mean",
    "mm",
    "rms_norm",
    "rotary_embedding",
    "rotary_tables",
    "rsqrt",
    "scaled_dot_product_attention",
    "sgd",
    "sigmoid",
    "silu",
    "silu_mul",
    "sin",
    "softmax",
    "sum",
    "tanh",
    "token_logprobs",
    "var",
    "workspace_bytes",
]
