"""The weight matrices of the models that the benchmarks run, one entry per projection of a decoder layer and the LM head."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Projection:
    """A linear layer with a weight of [n, k]: k inputs, n outputs."""

    name: str
    n: int
    k: int


MODELS: dict[str, tuple[Projection, ...]] = {
    "Llama-3-8B": (
        Projection("qkv", 6144, 4096),  # 32 query and 2 x 8 key-value heads of 128
        Projection("o", 4096, 4096),
        Projection("gate_up", 28672, 4096),  # 2 x 14336
        Projection("down", 4096, 14336),
        Projection("lm_head", 128256, 4096),
    ),
    "Llama-3-70B": (
        Projection("qkv", 10240, 8192),  # 64 query and 2 x 8 key-value heads of 128
        Projection("o", 8192, 8192),
        Projection("gate_up", 57344, 8192),  # 2 x 28672
        Projection("down", 8192, 28672),
        Projection("lm_head", 128256, 8192),
    ),
    "Qwen3-8B": (
        Projection("qkv", 6144, 4096),  # 32 query and 2 x 8 key-value heads of 128
        Projection("o", 4096, 4096),
        Projection("gate_up", 24576, 4096),  # 2 x 12288
        Projection("down", 4096, 12288),
        Projection("lm_head", 151936, 4096),
    ),
}

ROWS = (1, 8, 16, 32, 64, 128, 512, 2048, 8192)
"""M: tokens in the batch, from one decoded token to a long prefill."""
