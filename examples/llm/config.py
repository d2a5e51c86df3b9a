"""What both models share: sizes, names and shapes of the parameters, their first values, and how they are trained."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Config:
    """Sizes of a decoder of byte tokens.

    Attributes:
        layers: number of layers.
        width: elements of the residual stream.
        heads: query heads.
        kv_heads: heads of keys and values, each shared by `heads / kv_heads` query heads.
        head_dim: elements of a head.
        hidden: elements between the projections of the gated MLP.
        tied: the embedding is the head's weight too.
        vocab: number of tokens.
        theta: base of the rotary embedding's wavelengths.
        eps: of the norms.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    tied: bool = False
    vocab: int = 256
    theta: float = 10000.0
    eps: float = 1e-6

    @property
    def projected(self) -> tuple[int, int, int]:
        """Features of queries, keys and values."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters; those of the layers are stacked. Weights are [features, inputs]."""
        shapes = {
            "attention_norm": (self.layers, self.width),
            "down": (self.layers, self.width, self.hidden),
            "embedding": (self.vocab, self.width),
            "gate": (self.layers, self.hidden, self.width),
            "head": (self.vocab, self.width),
            "mlp_norm": (self.layers, self.width),
            "norm": (self.width,),
            "out": (self.layers, self.width, self.projected[0]),
            "qkv": (self.layers, sum(self.projected), self.width),
            "up": (self.layers, self.hidden, self.width),
        }
        return {name: shape for name, shape in shapes.items() if not (self.tied and name == "head")}

    def parameters(self) -> int:
        """How many there are."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def views(self, vector: Any) -> dict[str, Any]:
        """The parameters by name, as parts of the vector of all: an array of NumPy, PyTorch or JAX."""
        ends = itertools.accumulate(math.prod(shape) for shape in self.shapes().values())
        return {
            name: vector[end - math.prod(shape) : end].reshape(shape)
            for (name, shape), end in zip(self.shapes().items(), ends, strict=True)
        }

    def initial(self, seed: int = 0) -> np.ndarray:
        """The vector of all parameters to begin with, float32."""
        generator = np.random.default_rng(seed)

        def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
            if name.endswith("norm"):
                return np.ones(shape, np.float32)
            residual = (2 * self.layers) ** -0.5 if name in ("down", "out") else 1.0
            return np.float32(residual * shape[-1] ** -0.5) * generator.standard_normal(shape, np.float32)

        return np.concatenate([draw(name, shape).ravel() for name, shape in self.shapes().items()])


@dataclass(frozen=True)
class Training:
    """How the parameters, as one vector, are updated.

    Attributes:
        optimizer: AdamW, or SGD with momentum.
        lr: learning rate.
        clip: largest norm of all gradients together.
        momentum: of SGD.
        weight_decay: of either.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-3
    clip: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.01

    def state(self) -> tuple[str, ...]:
        """Names of the vectors, zeros at first, that the optimizer keeps."""
        return ("m", "v") if self.optimizer == "adamw" else ("buffer",)
