"""The decoder of `examples/llm` in JAX, with `bi_jax` and with stock operations, each as one jitted function.

The same program is compiled with either: a forward pass, and a decode step beside a cache of keys and values. As in PyTorch,
both are timed with attention and with a stub in its place that returns the query.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import bi_jax
from benchmarks.model_report import CONTEXT, DECODE, FORWARD, Measurement
from benchmarks.timing import Program, microseconds
from examples.llm import jax_model, jax_stock
from examples.llm.config import Config
from examples.llm.jax_model import Params

Cache = tuple[jax.Array, jax.Array]

SMALL = Config(layers=2, width=256, heads=4, kv_heads=2, head_dim=64, hidden=512, tied=True, vocab=512)
"""Compiled before anything is measured."""


def decode(weights: Params, config: Config, tokens: jax.Array, cache: Cache, ops: ModuleType) -> tuple[jax.Array, Cache]:
    """float32 logits [B, 1, vocab] of tokens [B, 1], and the cache with their keys and values.

    Args:
        weights: of `jax_model.forward`.
        config: the model.
        tokens: one of each sequence.
        cache: keys and values [layers, B, kv_heads, T, head_dim] of the tokens before.
        ops: where operations come from.
    """
    tables = ops.rotary_tables(jnp.full(1, cache[0].shape[3]), config.head_dim, config.theta)
    queries, keys, _ = config.projected
    batch = len(tokens)
    x = ops.embedding(tokens, weights["embedding"])

    def layer(carry: tuple[jax.Array, jax.Array], scanned: tuple[Params, Cache]) -> tuple[tuple[jax.Array, jax.Array], Cache]:
        w, (old_k, old_v) = scanned
        x, residual = ops.fused_add_rms_norm(*carry, w["attention_norm"], config.eps)
        turned, v = jnp.split(ops.linear(x, w["qkv"]), (queries + keys,), axis=-1)
        turned, v = (x.reshape(batch, -1, 1, config.head_dim) for x in (turned, v))
        q, k = jnp.split(ops.rotary_embedding(turned, *tables), (config.heads,), axis=1)
        k, v = jnp.concatenate([old_k, k], axis=2), jnp.concatenate([old_v, v], axis=2)
        y = ops.scaled_dot_product_attention(q, k, v, is_causal=False, enable_gqa=True)
        x, residual = ops.fused_add_rms_norm(
            ops.linear(y.reshape(batch, 1, queries), w["out"]), residual, w["mlp_norm"], config.eps
        )
        y = ops.silu_mul(ops.linear(x, w["gate"]), ops.linear(x, w["up"]))
        return (ops.linear(y, w["down"]), residual), (k, v)

    stacked = {name: weights[name] for name in ("attention_norm", "qkv", "out", "mlp_norm", "gate", "up", "down")}
    (x, residual), cache = lax.scan(layer, (x, jnp.zeros_like(x)), (stacked, cache))
    x, _ = ops.fused_add_rms_norm(x, residual, weights["norm"], config.eps)
    return ops.linear(x, weights["head"], out_dtype="float32"), cache


def without_attention(ops: ModuleType) -> ModuleType:
    """The same operations, but for attention: the query."""
    stub = ModuleType("without_attention")
    vars(stub).update(vars(ops), scaled_dot_product_attention=lambda query, *_, **__: query)
    return stub


def random_weights(config: Config) -> Params:
    """bfloat16 weights."""
    keys = jax.random.split(jax.random.key(0), len(config.shapes()))
    weights = {
        name: (jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5).astype(jnp.bfloat16)
        for key, (name, shape) in zip(keys, config.shapes().items(), strict=True)
    }
    return weights | ({"head": weights["embedding"]} if config.tied else {})


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        name: of the case.
        function: of weights, arguments and the module that operations come from.
        arguments: makes them.
    """

    name: str
    function: Callable[..., jax.Array]
    arguments: Callable[[], tuple[Any, ...]]


def cases(config: Config, forward: tuple[int, int], batches: tuple[int, ...], context: int) -> Iterator[Case]:
    """A pass over whole sequences, and decode steps of several batches."""

    def tokens(*shape: int) -> jax.Array:
        return jax.random.randint(jax.random.key(1), shape, 0, config.vocab)

    def filled(batch: int) -> tuple[jax.Array, Cache]:
        shape = (config.layers, batch, config.kv_heads, context, config.head_dim)
        keys, values = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(2))
        return tokens(batch, 1), (keys, values)

    yield Case(
        f"forward {forward[0]} x {forward[1]}",
        lambda weights, tokens, ops: jax_model.forward(weights, config, tokens, ops),
        lambda: (tokens(*forward),),
    )
    for batch in batches:
        yield Case(
            f"decode step, batch {batch}",
            lambda weights, tokens, cache, ops: decode(weights, config, tokens, cache, ops)[0],
            partial(filled, batch),
        )


def measure(config: Config) -> tuple[list[Measurement], list[Measurement]]:
    """Seconds to compile and milliseconds of every case on a GPU."""
    _start_compilers()
    weights = random_weights(config)
    compilations, times = [], []
    for case in cases(config, FORWARD, DECODE, CONTEXT):
        arguments = (weights, *case.arguments())
        for part, change in (("all", lambda ops: ops), ("without attention", without_attention)):
            seconds, programs = {}, {}
            for column, ops in (("stock", jax_stock), ("ours", bi_jax)):
                seconds[column], compiled = compilation(case, change(ops), arguments)
                programs[column] = _program(compiled, arguments)
            us = microseconds(programs, repeats=3)
            compilations.append(Measurement(case.name, part, "jit", **seconds))
            times.append(Measurement(case.name, part, "jit", **{column: value / 1e3 for column, value in us.items()}))
    return compilations, times


def _start_compilers() -> None:
    """What happens once in a process, such as importing them, is not the time of a case."""
    weights = random_weights(SMALL)
    for case in cases(SMALL, (1, 8), (1,), 8):
        for ops in (jax_stock, bi_jax):
            compilation(case, ops, (weights, *case.arguments()))


def compilation(case: Case, ops: ModuleType, arguments: tuple[Any, ...]) -> tuple[float, jax.stages.Compiled]:
    """Seconds to trace and compile a case, nothing of it done before, and the program."""
    jax.clear_caches()
    start = time.perf_counter()
    compiled = jax.jit(lambda *args: case.function(*args, ops)).lower(*arguments).compile()
    return time.perf_counter() - start, compiled


def _program(compiled: jax.stages.Compiled, arguments: tuple[Any, ...]) -> Program:
    return Program(1, lambda: compiled(*arguments), jax.block_until_ready)
