"""The reference model against outputs recorded on an H100: not one bit may differ."""

import numpy as np
import pytest

from shared_specs import gemm_contract
from shared_specs.formats import FLOAT32, float_format
from shared_specs.reference import gemm, tensor_core
from tests.golden.cases import FILE, dot_cases, gemm_cases


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as data:
        return dict(data)


def test_every_recorded_case_is_checked(golden):
    names = {case.name for case in dot_cases()} | {case.name for case in gemm_cases()}
    assert names == set(golden) - {"device"}


def groups(cases, *fields):
    """Cases that agree in `fields`: one test each."""
    grouped = {}
    for case in cases:
        grouped.setdefault("-".join(str(getattr(case, field)) for field in fields), []).append(case)
    return [pytest.param(members, id=name) for name, members in grouped.items()]


@pytest.mark.parametrize("cases", groups(dot_cases(), "dtype", "kind"))
def test_instructions(golden, cases):
    for case in cases:
        a, b, acc = case.inputs()
        start = np.zeros((case.m, case.n), np.float32) if acc is None else FLOAT32.decode(acc)
        arithmetic = gemm_contract(case.dtype).dot
        out = tensor_core.chain(case.format.decode(a), case.format.decode(b), start, case.format, arithmetic)
        np.testing.assert_array_equal(FLOAT32.encode(out), golden[case.name], err_msg=case.name)


@pytest.mark.parametrize("cases", groups(gemm_cases(), "dtype", "k", "out_dtype", "alpha", "beta"))
def test_products(golden, cases):
    """Every kind of value, as one batch."""
    case, (a, b, bias) = cases[0], map(np.stack, zip(*(case.inputs() for case in cases), strict=True))
    contract, out_format = gemm_contract(case.dtype), float_format(case.out_dtype)
    products = gemm(a, b, contract, bias_bits=bias, alpha=case.alpha, beta=case.beta, out_format=out_format)
    for case, out in zip(cases, products, strict=True):
        np.testing.assert_array_equal(out, golden[case.name], err_msg=case.name)
