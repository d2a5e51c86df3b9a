"""The demo reports what it should, on a small input: no difference for this library, and failure if there were one."""

import pytest
import torch

from examples import batch_invariance


@pytest.fixture(autouse=True)
def small_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_invariance, "TOKENS", 5)
    monkeypatch.setattr(batch_invariance, "HIDDEN", 192)
    monkeypatch.setattr(batch_invariance, "FEATURES", 24)
    monkeypatch.setattr(batch_invariance, "CPU_FEATURES", {"bfloat16": 24, "float32": 8})


def test_demo_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert batch_invariance.main() == 0
    out = capsys.readouterr().out
    assert out.count("0 of 120") >= 3
    assert "gemm-v1-bfloat16" in out


def test_demo_fails_if_the_batch_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_batch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight) + len(x)

    monkeypatch.setitem(batch_invariance.LIBRARIES, "bi_torch", by_batch)
    assert batch_invariance.main() == 1
