"""Batch-invariant ops for PyTorch: the same bits for a row alone and in a batch, on CPU, on CUDA and in `bi_jax`."""

import os

from bi_torch.attention import scaled_dot_product_attention
from bi_torch.gemm.api import addmm, baddbmm, bmm, linear, matmul, mm
from bi_torch.mode.switch import (
    VARIABLE,
    AttentionBlockSize,
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    enable_from_environment,
    get_batch_invariant_attention_block_size,
    is_batch_invariant_mode_enabled,
    set_batch_invariant_mode,
)
from bi_torch.rows.embedding import embedding
from bi_torch.rows.norm import fused_add_rms_norm, layer_norm, rms_norm
from bi_torch.rows.optimizer import adamw, adamw_, clip_by_global_norm, sgd, sgd_
from bi_torch.rows.pointwise import (
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
from bi_torch.rows.reduce import amax, amin, logsumexp, mean, sum, var  # noqa: A004
from bi_torch.rows.softmax import cross_entropy, log_softmax, softmax, token_logprobs

__all__ = [
    "AttentionBlockSize",
    "adamw",
    "adamw_",
    "addmm",
    "amax",
    "amin",
    "baddbmm",
    "bmm",
    "clip_by_global_norm",
    "cos",
    "cross_entropy",
    "disable_batch_invariant_mode",
    "embedding",
    "enable_batch_invariant_mode",
    "erf",
    "exp",
    "fused_add_rms_norm",
    "gelu",
    "get_batch_invariant_attention_block_size",
    "is_batch_invariant_mode_enabled",
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
    "set_batch_invariant_mode",
    "sgd",
    "sgd_",
    "sigmoid",
    "silu",
    "silu_mul",
    "sin",
    "softmax",
    "sum",
    "tanh",
    "token_logprobs",
    "var",
]

enable_from_environment(os.environ.get(VARIABLE))
