"""The contract of attention in NumPy, row by row and over the admitted keys alone, written to be read beside it."""

import numpy as np

from shared_specs.contract import gemm_contract
from shared_specs.formats import FLOAT32, FloatFormat
from shared_specs.programs.attention import FINITE_OR_NAN, attention_softmax, attention_softmax_backward
from shared_specs.reference.gemm import gemm
from shared_specs.reference.rows import run_rows


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    admitted: np.ndarray,
    mask: np.ndarray | None,
    scale: float,
    fmt: FloatFormat,
) -> np.ndarray:
    """The output of one head.

    Args:
        query: [Lq, E] bits of `fmt`.
        key: [Lk, E] bits of `fmt`.
        value: [Lk, Ev] bits of `fmt`.
        admitted: [Lq, Lk], True where a row admits a key.
        mask: float32 [Lq, Lk] that is added to the scores, or None.
        scale: rounded to float32 once.
        fmt: the operands' format.

    Returns:
        [Lq, Ev] bits of `fmt`.
    """
    out = np.zeros((len(query), value.shape[1]), fmt.storage)
    for i, keys in enumerate(admitted):
        weights = _weights(query[i], key[keys], None if mask is None else mask[i, keys], scale, fmt)
        out[i] = _product(weights, value[keys], 1.0, fmt)
    return out


def attention_gradients(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    admitted: np.ndarray,
    mask: np.ndarray | None,
    scale: float,
    fmt: FloatFormat,
    cotangent: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of query, key, value and mask, bits of `fmt`; arguments as for `attention`, cotangent [Lq, Ev]."""
    contract = gemm_contract(fmt.name)
    dquery = np.zeros(query.shape, fmt.storage)
    weights, dscores = (np.zeros(admitted.shape, fmt.storage) for _ in range(2))
    for i, keys in enumerate(admitted):
        row = _weights(query[i], key[keys], None if mask is None else mask[i, keys], scale, fmt)
        dweights = gemm(cotangent[i, None], value[keys].T, contract, out_format=FLOAT32)
        inputs = {"y": fmt.decode(row), "g": FLOAT32.decode(dweights)}
        drow = fmt.encode(run_rows(attention_softmax_backward(False), inputs)["dx"])
        dquery[i] = _product(drow, key[keys], scale, fmt)
        weights[i, keys], dscores[i, keys] = row[0], drow[0]
    reached = admitted.any(1)[:, None]  # a row that admits nothing gives zeros, whatever it holds
    query, cotangent = (np.where(reached, x, fmt.storage.type(0)) for x in (query, cotangent))
    return dquery, gemm(dscores.T, query, contract, alpha=scale), gemm(weights.T, cotangent, contract), dscores


def _weights(query: np.ndarray, key: np.ndarray, mask: np.ndarray | None, scale: float, fmt: FloatFormat) -> np.ndarray:
    """The softmax of one row, [1, keys] bits."""
    bias = None if mask is None else FLOAT32.encode(mask[None])
    contract = gemm_contract(fmt.name)
    scores = gemm(query[None], key.T, contract, bias_bits=bias, bias_format=FLOAT32, alpha=scale, out_format=FLOAT32)
    return fmt.encode(run_rows(attention_softmax(False), {"x": FLOAT32.decode(scores)})["y"])


def _product(weights: np.ndarray, values: np.ndarray, alpha: float, fmt: FloatFormat) -> np.ndarray:
    """alpha * weights [1, keys] @ values [keys, D]; what is not finite is NaN."""
    out = gemm(weights, values, gemm_contract(fmt.name), alpha=alpha)
    return fmt.encode(run_rows(FINITE_OR_NAN, {"x": fmt.decode(out)})["y"])[0]
