"""The decoder in PyTorch, a step of its training, and sampling. `jax_model` is the same in JAX, line by line where it can be.

`ops` is where operations come from: `bi_torch`, or the stock operations under the same names (`torch_stock`).
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import bi_torch
from examples.llm.config import Config, Training

Params = dict[str, Tensor]


class Cache:
    """Keys and values [layers, N, kv_heads, most, head_dim] of N sequences; a batch is some of them, `rows`."""

    def __init__(self, config: Config, sequences: int, most: int, device: torch.device) -> None:
        shape = config.layers, sequences, config.kv_heads, most, config.head_dim
        self.keys, self.values = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.rows = torch.arange(sequences, device=device)

    def extend(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of the batch, once its new ones have been stored from position `start` on."""
        stop = start + k.shape[2]
        self.keys[layer][self.rows, :, start:stop], self.values[layer][self.rows, :, start:stop] = k, v
        return self.keys[layer][self.rows, :, :stop], self.values[layer][self.rows, :, :stop]


def cast(params: Params, config: Config) -> Params:
    """bfloat16 weights to compute with. A tied head is a cast of its own, so that its gradient is added in float32."""
    heads = {"head": params["embedding"]} if config.tied else {}
    return {name: x.to(torch.bfloat16) for name, x in (params | heads).items()}


def forward(
    weights: Params, config: Config, tokens: Tensor, start: int = 0, cache: Cache | None = None, ops: ModuleType = bi_torch
) -> Tensor:
    """float32 logits [B, T, vocab] of tokens [B, T]: whole sequences, or the token at position `start` of cached ones."""
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
    tables = ops.rotary_tables(positions, config.head_dim, config.theta)
    x = ops.embedding(tokens, weights["embedding"])
    residual = torch.zeros_like(x)
    names = "attention_norm", "qkv", "out", "mlp_norm", "gate", "up", "down"
    for layer, stacked in enumerate(zip(*(weights[name].unbind() for name in names), strict=True)):
        w = dict(zip(names, stacked, strict=True))
        x, residual = ops.fused_add_rms_norm(x, residual, w["attention_norm"], config.eps)
        x = ops.linear(attention(ops.linear(x, w["qkv"]), tables, layer, start, cache, config, ops), w["out"])
        x, residual = ops.fused_add_rms_norm(x, residual, w["mlp_norm"], config.eps)
        y = ops.silu_mul(ops.linear(x, w["gate"]), ops.linear(x, w["up"]))
        x = ops.linear(y, w["down"])
    x, _ = ops.fused_add_rms_norm(x, residual, weights["norm"], config.eps)
    return ops.linear(x, weights["head"], out_dtype=torch.float32)


def attention(
    qkv: Tensor,
    tables: tuple[Tensor, Tensor],
    layer: int,
    start: int,
    cache: Cache | None,
    config: Config,
    ops: ModuleType,
) -> Tensor:
    """[B, T, heads * head_dim] of the projections of queries, keys and values."""
    batch, length, _ = qkv.shape
    parts = qkv.split(config.projected, dim=-1)
    q, k, v = (x.reshape(batch, length, -1, config.head_dim).transpose(1, 2) for x in parts)
    q, k = ops.rotary_embedding(q, *tables), ops.rotary_embedding(k, *tables)
    if cache is not None:
        k, v = cache.extend(layer, start, k, v)
    # A token behind cached ones sees them all: there is nothing to mask.
    y = ops.scaled_dot_product_attention(q, k, v, is_causal=start == 0, enable_gqa=True)
    return y.transpose(1, 2).reshape(batch, length, -1)


def loss(params: Params, config: Config, tokens: Tensor, ops: ModuleType = bi_torch) -> Tensor:
    """The mean cross entropy of tokens [B, T + 1], each given those before it."""
    logits = forward(cast(params, config), config, tokens[:, :-1], ops=ops)
    return ops.cross_entropy(logits.reshape(-1, config.vocab), tokens[:, 1:].reshape(-1))


def train_step(
    vector: Tensor,
    state: Params,
    step: int,
    tokens: Tensor,
    config: Config,
    training: Training,
    ops: ModuleType = bi_torch,
) -> tuple[Tensor, Params, Tensor]:
    """The new vector of all parameters, the optimizer's new state, and the loss before; `step` counts from 1."""
    params = {name: x.detach().requires_grad_() for name, x in config.views(vector).items()}
    value = loss(params, config, tokens, ops)
    gradients = torch.autograd.grad(value, list(params.values()))
    gradient = torch.cat([x.reshape(-1) for x in gradients])
    (gradient,), _ = bi_torch.clip_by_global_norm([gradient], training.clip)
    options: dict[str, Any] = {"lr": training.lr, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        new, m, v = bi_torch.adamw(vector, gradient, state["m"], state["v"], step, **options)
        return new, {"m": m, "v": v}, value.detach()
    new, buffer = bi_torch.sgd(vector, gradient, state["buffer"], momentum=training.momentum, **options)
    assert buffer is not None
    return new, {"buffer": buffer}, value.detach()


@torch.no_grad()
def generate(
    vector: Tensor, config: Config, prompts: Tensor, uniforms: Tensor, batches: torch.Generator, ops: ModuleType = bi_torch
) -> tuple[Tensor, Tensor, list[int]]:
    """Sample a continuation of each prompt, in batches that are drawn anew for every token.

    Args:
        vector: of all parameters, float32.
        config: sizes.
        prompts: tokens [N, P].
        uniforms: numbers in [0, 1), float64 [N, T]: what each sampled token depends on, besides its probabilities.
        batches: draws how many sequences, and which, are computed together.
        ops: the operations.

    Returns:
        The tokens [N, P + T]; the log-probabilities [N, T, vocab] that the last T were sampled from; the sizes of all batches.
    """
    weights = cast(config.views(vector), config)
    (sequences, first), count = prompts.shape, uniforms.shape[1]
    tokens = torch.cat([prompts, prompts.new_zeros(sequences, count)], 1)
    cache = Cache(config, sequences, first + count, prompts.device)
    log_probabilities = torch.empty(sequences, count, config.vocab, device=prompts.device)
    sizes: list[int] = []
    for i in range(count):
        start = first + i - 1 if i else 0
        for rows in _random_batches(sequences, batches):
            cache.rows = rows.to(prompts.device)
            logits = forward(weights, config, tokens[cache.rows, start : first + i], start, cache, ops)
            given = ops.log_softmax(logits[:, -1], -1)
            cumulative = given.double().exp().cumsum(-1)
            chosen = torch.searchsorted(cumulative, uniforms[cache.rows, i, None] * cumulative[:, -1:])
            log_probabilities[cache.rows, i], tokens[cache.rows, first + i] = given, chosen[:, 0].to(tokens.dtype)
            sizes.append(len(rows))
    return tokens, log_probabilities, sizes


def _random_batches(sequences: int, generator: torch.Generator) -> list[Tensor]:
    """A random order of the sequences, cut at random places."""
    order = torch.randperm(sequences, generator=generator)
    cuts = torch.randint(0, sequences, (2,), generator=generator).sort().values
    return [rows for rows in order.tensor_split(cuts) if len(rows)]
