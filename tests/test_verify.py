"""The verify commands: clean engines pass, one flipped bit anywhere fails, the JSON holds what the table shows."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bi_jax.verify import CPU_EVERY
from shared_specs import gemm_contract, verification
from shared_specs.formats import FORMATS, float_format
from shared_specs.inputs import KINDS
from shared_specs.reference import gemm
from shared_specs.verification import OPS, Case, Engine, Operands


def model(case: Case, operands: Operands) -> np.ndarray:
    b = operands.b.T if case.op == "linear" else operands.b
    return gemm(
        operands.a,
        b,
        gemm_contract(case.operand),
        bias_bits=operands.bias,
        alpha=case.alpha,
        beta=case.beta,
        out_format=float_format(case.out),
    )


def one_bit_off(case: Case, operands: Operands) -> np.ndarray:
    out = model(case, operands)
    if case.op == "bmm" and case.operand == "float16" and out.size:
        out.flat[-1] ^= 1
    return out


def engine_of(run) -> Engine:
    return Engine(name="model", environment={"device": "none"}, run=run, large=False)


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "SMALL_CASES_PER_DTYPE", len(OPS))


@pytest.mark.usefixtures("few_cases")
def test_equal_bits_pass(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert verification.main(engine_of(model), file) == 0
    assert "0 differing bits" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert {(row["op"], row["dtype"]) for row in result["rows"]} == {(op, dtype) for op in OPS for dtype in FORMATS}
    assert result["contracts"] == {dtype: gemm_contract(dtype).contract_id for dtype in FORMATS}
    assert result["failures"] == []


@pytest.mark.usefixtures("few_cases")
def test_one_bit_fails(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert verification.main(engine_of(one_bit_off), file) == 1
    assert "1 differing bits" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert [(row["op"], row["dtype"]) for row in result["rows"] if row["differing_bits"]] == [("bmm", "float16")]
    (failure,) = result["failures"]
    assert (failure["case"]["op"], failure["differing_outputs"], failure["differing_bits"]) == ("bmm", 1, 1)


def test_wrong_shapes_are_not_compared() -> None:
    case = next(iter(verification.cases(large=False)))
    with pytest.raises(AssertionError, match="expected"):
        verification.check(engine_of(lambda case, operands: model(case, operands)[:0]), case)


def test_cases_cover_what_they_claim() -> None:
    small = list(verification.cases(large=False))
    assert {(c.op, c.operand, c.out) for c in small} >= {(op, d, o) for op in OPS for d in FORMATS for o in (d, "float32")}
    assert len({(c.batch, c.m, c.n, c.k) for c in small}) >= 150
    some = list(verification.cases(large=False, every=CPU_EVERY))
    assert {(c.op, c.operand) for c in some} == {(op, d) for op in OPS for d in FORMATS}
    large = [c for c in verification.cases(large=True) if c.sampled]
    assert {c.operand for c in large} == set(FORMATS)


def test_operands_mix_the_kinds() -> None:
    case = Case("mm", "bfloat16", "bfloat16", 1, 64, 64, 64, 1.0, 1.0, seed=0)
    values = float_format("bfloat16").decode(verification.operands(case).a)
    rows = [values[i :: len(KINDS)] for i in range(len(KINDS))]
    assert (rows[KINDS.index("positive")] > 0).all()
    assert (abs(rows[KINDS.index("subnormal")]) < 2.0**-124).all()
    assert not np.isfinite(rows[KINDS.index("special")]).all()
    again = float_format("bfloat16").decode(verification.operands(case).a)
    assert values.tobytes() == again.tobytes()


@pytest.mark.parametrize("package", ["bi_torch", "bi_jax"])
def test_the_command_passes_on_this_cpu(package: str, tmp_path) -> None:
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", f"{package}.verify", "--device", "cpu", "--every", "13", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {(row["op"], row["dtype"]) for row in rows} == {(op, dtype) for op in OPS for dtype in FORMATS}
    assert sum(row["outputs"] for row in rows) > 10_000


@pytest.mark.gpu
@pytest.mark.parametrize("package", ["bi_torch", "bi_jax"])
def test_the_command_passes_on_this_gpu(package: str) -> None:
    command = [sys.executable, "-m", f"{package}.verify", "--device", "cuda", "--every", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
