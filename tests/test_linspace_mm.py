"""The demonstration of the mode: a row of a product alone and in a batch, mode off and on."""

import pytest
import torch

from examples import linspace_mm


def test_no_difference_under_the_mode(capsys: pytest.CaptureFixture[str]) -> None:
    assert linspace_mm.main(["--rows", "18", "--columns", "24"]) == 0
    assert capsys.readouterr().out.count("0 of 24") >= 2


def test_fails_if_there_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "mm", lambda a, b: a.sum() + b[:1])
    assert linspace_mm.main(["--rows", "3", "--columns", "5"]) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", linspace_mm.DTYPES)
def test_full_size(dtype: torch.dtype) -> None:
    a, b = linspace_mm.matrices(linspace_mm.ROWS, linspace_mm.COLUMNS, dtype, "cuda")
    if dtype == torch.float32:  # in bfloat16 torch happens to agree with itself on these matrices
        assert linspace_mm.difference(a, b, enabled=False).outputs > 0
    assert linspace_mm.difference(a, b, enabled=True) == linspace_mm.Difference(0, linspace_mm.COLUMNS, 0.0)
