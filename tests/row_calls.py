"""Calls of the public row functions: shapes of their tensors, and options."""

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.arrays import draw


@dataclass(frozen=True)
class RowCall:
    """One call.

    Attributes:
        name: of the function.
        shapes: of its tensors in order, None for one that is left out.
        options: by keyword.
        ids: (position, number of ids) of an integer tensor.
        fixed: positions of tensors that are float32 and get no gradient.
        listed: the tensors are one argument.
        differentiable: False for optimizers and tables.
    """

    name: str
    shapes: tuple[tuple[int, ...] | None, ...]
    options: dict[str, Any] = field(default_factory=dict)
    ids: tuple[int, int] | None = None
    fixed: tuple[int, ...] = ()
    listed: bool = False
    differentiable: bool = True

    def arguments(self, dtype: str = "float32", kind: str = "normal") -> list[Any]:
        """CPU tensors; second moments are positive."""
        tensors: list[Any] = []
        for i, shape in enumerate(self.shapes):
            if shape is None:
                tensors.append(None)
            elif self.ids and self.ids[0] == i:
                tensors.append(torch.randint(self.ids[1], shape, generator=torch.Generator().manual_seed(i)))
            else:
                tensors.append(draw(*shape, dtype="float32" if i in self.fixed else dtype, kind=kind, seed=i))
        if self.name in ("log", "rsqrt"):
            tensors = [x.abs() + 0.1 for x in tensors]
        if self.name.startswith("adamw"):
            tensors[3] = tensors[3].square()
        return [tensors] if self.listed else tensors

    def __str__(self) -> str:
        return f"{self.name}-{'-'.join(str(list(s or ())) for s in self.shapes)}-{self.options}".replace(" ", "")


ALIKE = {"log", "sin", "cos", "erf", "tanh", "sigmoid", "rsqrt", "silu", "amin", "log_softmax"}
"""Functions that differ from another one in their program only."""

X = (3, 4, 10)
ROW_CALLS = [
    *(RowCall(name, (X,), {"dim": dim}) for name in ("sum", "mean", "amax", "amin", "var") for dim in (-1, (0, 2), None)),
    *(RowCall("logsumexp", (X,), {"dim": dim}) for dim in (-1, (0, 2))),
    *(RowCall(name, (X,), {"dim": dim}) for name in ("softmax", "log_softmax") for dim in (2, 0)),
    RowCall("token_logprobs", ((3, 4, 10), (3, 4)), ids=(1, 10)),
    RowCall("token_logprobs", ((7, 10), (7,)), {"temperature": 0.7}, ids=(1, 10)),
    RowCall("cross_entropy", ((7, 10), (7,)), ids=(1, 10)),
    RowCall("cross_entropy", ((7, 10), (7,)), {"ignore_index": 3, "reduction": "sum"}, ids=(1, 5)),
    RowCall("cross_entropy", ((3, 10, 2), (3, 2)), {"label_smoothing": 0.2, "reduction": "none"}, ids=(1, 10)),
    RowCall("cross_entropy", ((10,), ()), {"label_smoothing": 0.2, "ignore_index": 3}, ids=(1, 10)),
    *(
        RowCall("layer_norm", (X, weight, bias), {"normalized_shape": (10,)})
        for weight in (None, (10,))
        for bias in (None, (10,))
    ),
    RowCall("layer_norm", (X, (4, 10), (4, 10)), {"normalized_shape": (4, 10), "eps": 0.1}),
    *(RowCall("rms_norm", (X, weight), {"normalized_shape": (10,)}) for weight in (None, (10,))),
    *(RowCall("fused_add_rms_norm", (X, X, weight)) for weight in (None, (10,))),
    RowCall("embedding", ((3, 8), (10, 6)), ids=(0, 8)),
    RowCall("embedding", ((30,), (10, 6)), {"padding_idx": 2}, ids=(0, 8)),
    *(RowCall(name, (X,)) for name in ("exp", "log", "sin", "cos", "erf", "tanh", "sigmoid", "rsqrt", "silu", "gelu")),
    RowCall("gelu", (X,), {"approximate": "tanh"}),
    RowCall("silu_mul", (X, X)),
    *(RowCall("rotary_embedding", (X, (4, 5), (4, 5)), {"interleaved": flag}, fixed=(1, 2)) for flag in (False, True)),
    RowCall("rotary_tables", ((3, 4),), {"head_dim": 10}, ids=(0, 1 << 20), differentiable=False),
    RowCall("clip_by_global_norm", (X, (7,), ()), {"max_norm": 1.0}, listed=True, differentiable=False),
    *(RowCall(name, (X, X), {"lr": 0.1, "weight_decay": 0.1}, differentiable=False) for name in ("sgd", "sgd_")),
    *(
        RowCall(name, (X, X, buffer), {"lr": 0.1, "momentum": 0.9, "nesterov": flag}, differentiable=False)
        for name in ("sgd", "sgd_")
        for buffer in (None, X)
        for flag in (False, True)
    ),
    *(RowCall(name, (X, X, X, X), {"step": 3}, differentiable=False) for name in ("adamw", "adamw_")),
]
