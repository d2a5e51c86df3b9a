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
from shared_specs.programs.catalogue import ROW_PROGRAMS
from shared_specs.reference import gemm
from shared_specs.rows import ROW_CONTRACT
from shared_specs.verification import Engine, GemmCase, Operands, RowCase
from shared_specs.verification import gemm as gemm_cases
from shared_specs.verification import rows as row_cases
from shared_specs.verification.gemm import OPS

LINES = {*OPS, *ROW_PROGRAMS, "column sums"}


def model(case: GemmCase, operands: Operands) -> np.ndarray:
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


def one_bit_off(case: GemmCase, operands: Operands) -> np.ndarray:
    out = model(case, operands)
    if case.op == "bmm" and case.operand == "float16" and out.size:
        out.flat[-1] ^= 1
    return out


def row_model(case: RowCase, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return case.expected(inputs)


def one_bit_off_in_a_row(case: RowCase, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs = case.expected(inputs)
    if case.program == "softmax" and case.dtype == "float32":
        outputs["y"].flat[-1] ^= 1
    return outputs


def engine_of(gemm=model, rows=row_model) -> Engine:
    return Engine(name="model", environment={"device": "none"}, gemm=gemm, rows=rows, large=False)


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_cases, "SMALL_CASES_PER_DTYPE", len(OPS))
    monkeypatch.setattr(row_cases, "COLUMNS", (1, 33))


@pytest.mark.usefixtures("few_cases")
def test_equal_bits_pass(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert verification.main(engine_of(), file) == 0
    assert "0 differing bits" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert {(row["op"], row["dtype"]) for row in result["rows"]} == {(op, dtype) for op in LINES for dtype in FORMATS}
    assert result["contracts"].items() >= {f"gemm {dtype}": gemm_contract(dtype).contract_id for dtype in FORMATS}.items()
    assert set(row_cases.PROGRAMS) < set(result["contracts"])
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
    assert verification.main(engine_of(rows=one_bit_off_in_a_row), file) == 1
    (failure,) = json.loads(file.read_text())["failures"]
    assert (failure["case"]["program"], failure["differing_outputs"], failure["differing_bits"]) == ("softmax", 1, 1)


def test_wrong_shapes_are_not_compared() -> None:
    case = next(iter(gemm_cases.cases(large=False)))
    with pytest.raises(AssertionError, match="expected"):
        verification.check(engine_of(gemm=lambda case, operands: model(case, operands)[:0]), case)
    row_case = next(iter(row_cases.cases(large=False)))
    with pytest.raises(AssertionError, match=row_case.program):
        verification.check(
            engine_of(rows=lambda case, inputs: {k: v[:0] for k, v in row_model(case, inputs).items()}), row_case
        )


def test_cases_cover_what_they_claim() -> None:
    small = list(gemm_cases.cases(large=False))
    assert {(c.op, c.operand, c.out) for c in small} >= {(op, d, o) for op in OPS for d in FORMATS for o in (d, "float32")}
    assert len({(c.batch, c.m, c.n, c.k) for c in small}) >= 150
    some = list(gemm_cases.cases(large=False, every=CPU_EVERY))
    assert {(c.op, c.operand) for c in some} == {(op, d) for op in OPS for d in FORMATS}
    large = [c for c in gemm_cases.cases(large=True) if c.sampled]
    assert {c.operand for c in large} == set(FORMATS)
    assert {c.program for c in row_cases.cases(large=False)} == set(row_cases.PROGRAMS)
    assert max(c.columns for c in row_cases.cases(large=True)) > 2 * ROW_CONTRACT.segment


def test_operands_mix_the_kinds() -> None:
    case = GemmCase("mm", "bfloat16", "bfloat16", 1, 64, 64, 64, 1.0, 1.0, seed=0)
    values = float_format("bfloat16").decode(gemm_cases.operands(case).a)
    rows = [values[i :: len(KINDS)] for i in range(len(KINDS))]
    assert (rows[KINDS.index("positive")] > 0).all()
    assert (abs(rows[KINDS.index("subnormal")]) < 2.0**-124).all()
    assert not np.isfinite(rows[KINDS.index("special")]).all()
    again = float_format("bfloat16").decode(gemm_cases.operands(case).a)
    assert values.tobytes() == again.tobytes()


@pytest.mark.parametrize(("package", "every"), [("bi_torch", 19), ("bi_jax", 150)])  # JAX compiles every case
def test_the_command_passes_on_this_cpu(package: str, every: int, tmp_path) -> None:
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", f"{package}.verify", "--device", "cpu", "--every", str(every), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    seen = {(row["op"], row["dtype"]) for row in rows}
    assert seen >= {(line, dtype) for line in (LINES if every < 20 else LINES - set(OPS)) for dtype in FORMATS}
    assert sum(row["outputs"] for row in rows) > 10_000


@pytest.mark.gpu
@pytest.mark.parametrize("package", ["bi_torch", "bi_jax"])
def test_the_command_passes_on_this_gpu(package: str) -> None:
    command = [sys.executable, "-m", f"{package}.verify", "--device", "cuda", "--every", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
