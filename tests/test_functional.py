"""`bi_torch.functional`: every name has the bits of the op that it stands for, and the container counts."""

import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bi_torch
from bi_torch import functional
from bi_torch.functional import BatchInvariantOps
from tests.arrays import assert_same, draw

A, B, BIAS = draw(5, 20), draw(20, 6, seed=1), draw(6, seed=2)
BATCH_A, BATCH_B = draw(2, 5, 20), draw(2, 20, 6, seed=1)
WEIGHT = draw(20, seed=3)

CASES = {
    "matmul_persistent": ((A, B, BIAS), lambda: bi_torch.addmm(BIAS, A, B)),
    "mm_batch_invariant": ((A, B), lambda: bi_torch.mm(A, B)),
    "bmm_batch_invariant": ((BATCH_A, BATCH_B), lambda: bi_torch.bmm(BATCH_A, BATCH_B)),
    "addmm_batch_invariant": ((BIAS, A, B), lambda: bi_torch.addmm(BIAS, A, B)),
    "matmul_batch_invariant": ((A, BATCH_B), lambda: bi_torch.matmul(A, BATCH_B)),
    "linear_batch_invariant": ((BATCH_A, B.t(), BIAS), lambda: bi_torch.linear(BATCH_A, B.t(), BIAS)),
    "softmax_batch_invariant": ((A, 0, torch.float32), lambda: bi_torch.softmax(A, 0, torch.float32)),
    "log_softmax_batch_invariant": ((A, 1), lambda: bi_torch.log_softmax(A, 1)),
    "log_softmax": ((A,), lambda: bi_torch.log_softmax(A, -1)),
    "mean_batch_invariant": ((BATCH_A, (0, 2), True), lambda: bi_torch.mean(BATCH_A, (0, 2), True)),
    "mean_dim": ((A, 0, False, torch.float32), lambda: bi_torch.mean(A, 0, dtype=torch.float32)),
    "gelu_batch_invariant": ((A,), lambda: bi_torch.gelu(A)),
    "layer_norm_batch_invariant": (
        (A, (20,), WEIGHT, WEIGHT, 1e-3),
        lambda: bi_torch.layer_norm(A, (20,), WEIGHT, WEIGHT, 1e-3),
    ),
    "rms_norm_batch_invariant": ((A, WEIGHT), lambda: bi_torch.rms_norm(A, (20,), WEIGHT, 1e-6)),
}


@pytest.mark.parametrize("name", CASES)
def test_function(name):
    args, expected = CASES[name]
    assert_same(getattr(functional, name)(*args), expected())


def test_every_name_has_a_case():
    assert set(CASES) | {"BatchInvariantOps"} == set(functional.__all__)


@pytest.mark.parametrize(
    ("name", "arguments"),
    {
        "matmul_persistent": "a b bias=None",
        "bmm_batch_invariant": "a b *out=None",
        "mm_batch_invariant": "a b *out=None",
        "linear_batch_invariant": "input weight bias=None",
        "softmax_batch_invariant": "input dim dtype=None",
        "log_softmax": "input dim=-1",
        "mean_batch_invariant": "input dim keepdim=False dtype=None",
        "mean_dim": "input dim keepdim=False dtype=None",
        "rms_norm_batch_invariant": "input weight eps=1e-06",
    }.items(),
)
def test_signature(name, arguments):
    parameters = inspect.signature(getattr(functional, name)).parameters.values()
    shown = ("*" * (p.kind is p.KEYWORD_ONLY) + p.name + ("" if p.default is p.empty else f"={p.default}") for p in parameters)
    assert " ".join(shown) == arguments


def test_a_bias_broadcasts_and_is_rounded_once():
    bias = draw(5, 1, seed=4)
    assert_same(functional.addmm_batch_invariant(bias, A, B), bi_torch.addmm(bias.expand(5, 6), A, B))


def test_out_is_written():
    out = torch.empty(5, 6, dtype=torch.bfloat16)
    assert functional.mm_batch_invariant(A, B, out=out) is out
    assert_same(out, bi_torch.mm(A, B))


def test_means_of_integers_are_float32():
    assert_same(functional.mean_batch_invariant(torch.arange(6).reshape(2, 3), 1), torch.tensor([1.0, 4.0]))


METHODS = {
    "matmul": ((A, B, BIAS), 5, 30),
    "softmax": ((BATCH_A, -1), 10, 200),
    "log_softmax": ((A, 0), 5, 100),
    "mean": ((BATCH_A, 2), 2, 10),
    "mm": ((A, B), 5, 30),
    "bmm": ((BATCH_A, BATCH_B), 10, 60),
    "addmm": ((BIAS, A, B), 5, 30),
    "gelu": ((A,), 5, 100),
    "layer_norm": ((A, (20,), WEIGHT, None, 1e-5), 5, 100),
    "rms_norm": ((A, WEIGHT), 5, 100),
}


def test_the_container_counts():
    ops = BatchInvariantOps("cpu", torch.float16)
    for name, (args, rows, elements) in METHODS.items():
        getattr(ops, name)(*args)
        ops.mm(A, B)
        expected = {"calls": 1, "rows": rows, "elements": elements}
        assert ops.get_stats()[name] == (expected if name != "mm" else {"calls": 2, "rows": 10, "elements": 60})
        ops.reset_stats()
        assert ops.get_stats() == {}


def test_the_container_is_shared_by_threads():
    ops = BatchInvariantOps()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: ops.mean(WEIGHT, 0), range(32)))
    assert ops.get_stats() == {"mean": {"calls": 32, "rows": 32, "elements": 32}}


def test_the_container_keeps_the_inputs_dtype():
    ops = BatchInvariantOps(dtype=torch.float16)
    assert_same(ops.mm(A, B), bi_torch.mm(A, B))
    assert_same(ops.gelu(A.double()), bi_torch.gelu(A.half()))
    with pytest.raises(TypeError, match="dtype must be one of torch.bfloat16, torch.float16, torch.float32, got torch.float64"):
        BatchInvariantOps(dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"BatchInvariantOps.mm: tensors must be on cuda, got cpu"):
        BatchInvariantOps("cuda").mm(A, B)
