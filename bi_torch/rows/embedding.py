"""embedding, and its gradient: a sum over tokens in their order."""

from typing import Any

import torch
from torch import Tensor

from bi_torch.rows.arguments import IDS, check_tensor
from bi_torch.rows.cpu import subnormals_kept
from bi_torch.rows.cpu_arithmetic import encode
from bi_torch.rows.library import Op


def _lookup(weight: Tensor, ids: Tensor, padding_idx: int) -> Tensor:
    return weight.index_select(0, ids)


def _backward_cpu(g: Tensor, ids: Tensor, rows: int, padding_idx: int, dtype: torch.dtype) -> Tensor:
    """All rows that have a k-th token add it, for k = 0, 1, ...: so each row adds its tokens in their order."""
    dweight = torch.zeros((rows, g.shape[1]), dtype=dtype, device="cpu")
    ordered, tokens = torch.sort(ids, stable=True)
    found, counts = torch.unique_consecutive(ordered, return_counts=True)
    first = counts.cumsum(0) - counts
    kept = (found != padding_idx).nonzero()[:, 0]
    found, counts, first = found[kept], counts[kept], first[kept]
    with subnormals_kept(g.numel()) as tile:
        step = max(1, tile // max(1, g.shape[1]))
        for lo in range(0, len(found), step):
            part = slice(lo, lo + step)
            sums = torch.zeros((len(found[part]), g.shape[1]), dtype=torch.float32, device="cpu")
            for k in range(int(counts[part].max())):
                more = (counts[part] > k).nonzero()[:, 0]
                sums[more] += g[tokens[first[part][more] + k]].to(torch.float32)
            dweight[found[part].to(torch.int64)] = encode(sums, dtype)
    return dweight


def _backward_cuda(*args: Any) -> Tensor:
    from bi_torch.rows import embedding_kernel  # imports Triton

    return embedding_kernel.backward(*args)


_embedding_backward = Op(
    "embedding_backward(Tensor g, Tensor ids, SymInt rows, SymInt padding_idx, ScalarType dtype) -> Tensor dweight",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=lambda g, ids, rows, padding_idx, dtype: g.new_empty((rows, g.shape[1]), dtype=dtype),
)
_embedding = Op(
    "embedding(Tensor weight, Tensor ids, SymInt padding_idx) -> Tensor y",
    cpu=_lookup,
    cuda=_lookup,
    fake=_lookup,
    keep=("ids",),
    gradient=lambda s, g: {"weight": _embedding_backward(g.y, s.ids, s.shapes["weight"][0], s.padding_idx, s.dtypes["weight"])},
)


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """The rows of weight [V, D] at ids [*]: a copy of their bits, [*, D].

    The gradient of a row is the sum of the cotangents of its tokens, one after the other in their order, float32 and rounded
    once; 0 for the row `padding_idx`.
    """
    check_tensor("embedding", "weight", weight)
    check_tensor("embedding", "ids", ids, IDS, like=weight)
    if weight.dim() != 2:
        raise RuntimeError(f"bi_torch.embedding: weight must have 2 dimensions, got {list(weight.shape)}")
    rows = weight.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise AssertionError(f"bi_torch.embedding: padding_idx must be within {rows} rows, got {padding_idx}")
    ignored = -1 if padding_idx is None else padding_idx % rows
    return _embedding(weight, ids.reshape(ids.numel()), ignored).reshape(*ids.shape, weight.shape[1])


def embedding_backward(g: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """The gradient [rows, D] of the weight of `embedding` from the cotangents g [*, D] at ids [*]; padding_idx may be -1."""
    check_tensor("embedding_backward", "g", g)
    check_tensor("embedding_backward", "ids", ids, IDS, like=g)
    return _embedding_backward(g.reshape(ids.numel(), g.shape[-1]), ids.reshape(ids.numel()), rows, padding_idx, g.dtype)
