"""The decoder in JAX, and a step of its training. `torch_model` is the same in PyTorch, line by line where it can be.

`ops` is where operations come from: `bi_jax`, or the stock operations under the same names (`jax_stock`).
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import bi_jax
from examples.llm.config import Config, Training

Params = dict[str, jax.Array]


def cast(params: Params, config: Config) -> Params:
    """bfloat16 weights to compute with. A tied head is a cast of its own, so that its gradient is added in float32."""
    heads = {"head": params["embedding"]} if config.tied else {}
    return {name: x.astype(jnp.bfloat16) for name, x in (params | heads).items()}


def forward(weights: Params, config: Config, tokens: jax.Array, ops: ModuleType = bi_jax) -> jax.Array:
    """float32 logits [B, T, vocab] of tokens [B, T]."""
    positions = jnp.arange(tokens.shape[1])
    tables = ops.rotary_tables(positions, config.head_dim, config.theta)
    x = ops.embedding(tokens, weights["embedding"])

    def layer(carry: tuple[jax.Array, jax.Array], w: Params) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, residual = ops.fused_add_rms_norm(*carry, w["attention_norm"], config.eps)
        x = ops.linear(attention(ops.linear(x, w["qkv"]), tables, config, ops), w["out"])
        x, residual = ops.fused_add_rms_norm(x, residual, w["mlp_norm"], config.eps)
        y = ops.silu_mul(ops.linear(x, w["gate"]), ops.linear(x, w["up"]))
        return (ops.linear(y, w["down"]), residual), None

    stacked = {name: weights[name] for name in ("attention_norm", "qkv", "out", "mlp_norm", "gate", "up", "down")}
    (x, residual), _ = lax.scan(layer, (x, jnp.zeros_like(x)), stacked)
    x, _ = ops.fused_add_rms_norm(x, residual, weights["norm"], config.eps)
    return ops.linear(x, weights["head"], out_dtype="float32")


def attention(qkv: jax.Array, tables: tuple[jax.Array, jax.Array], config: Config, ops: ModuleType) -> jax.Array:
    """[B, T, heads * head_dim] of the projections of queries, keys and values."""
    batch, length, _ = qkv.shape
    queries, keys, _ = config.projected
    parts = jnp.split(qkv, (queries, queries + keys), axis=-1)
    q, k, v = (x.reshape(batch, length, -1, config.head_dim).swapaxes(1, 2) for x in parts)
    q, k = ops.rotary_embedding(q, *tables), ops.rotary_embedding(k, *tables)
    y = ops.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.swapaxes(1, 2).reshape(batch, length, -1)


def log_probabilities(vector: jax.Array, config: Config, tokens: jax.Array, start: int, ops: ModuleType = bi_jax) -> jax.Array:
    """Log-probabilities [B, T - start, vocab] of each token from position `start` on, given those before it."""
    logits = forward(cast(config.views(vector), config), config, tokens, ops)
    return ops.log_softmax(logits[:, start - 1 : -1], -1)


def loss(params: Params, config: Config, tokens: jax.Array, ops: ModuleType = bi_jax) -> jax.Array:
    """The mean cross entropy of tokens [B, T + 1], each given those before it."""
    logits = forward(cast(params, config), config, tokens[:, :-1], ops)
    return ops.cross_entropy(logits.reshape(-1, config.vocab), tokens[:, 1:].reshape(-1))


def train_step(
    vector: jax.Array,
    state: Params,
    step: jax.Array,
    tokens: jax.Array,
    config: Config,
    training: Training,
    ops: ModuleType = bi_jax,
) -> tuple[jax.Array, Params, jax.Array]:
    """The new vector of all parameters, the optimizer's new state, and the loss before; `step` counts from 1."""
    value, gradients = jax.value_and_grad(loss)(config.views(vector), config, tokens, ops)
    gradient = jnp.concatenate([gradients[name].reshape(-1) for name in config.shapes()])
    (gradient,), _ = bi_jax.clip_by_global_norm([gradient], training.clip)
    options: dict[str, Any] = {"lr": training.lr, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        new, m, v = bi_jax.adamw(vector, gradient, state["m"], state["v"], step, **options)
        return new, {"m": m, "v": v}, value
    new, buffer = bi_jax.sgd(vector, gradient, state["buffer"], momentum=training.momentum, **options)
    assert buffer is not None
    return new, {"buffer": buffer}, value
