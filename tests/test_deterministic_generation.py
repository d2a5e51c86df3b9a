"""The example counts what it says: one completion under the mode, and failure if there were more."""

import json
from contextlib import nullcontext

from examples import deterministic_generation as example

SMALL = ["--n", "5", "--tokens", "3", "--batch", "4"]


def test_one_completion_under_the_mode(tmp_path, capsys):
    assert example.main([*SMALL, "--json", str(tmp_path / "out.json")]) == 0
    outcomes = json.loads((tmp_path / "out.json").read_text())
    ways = [(mode, decoding) for mode in ("off", "on") for decoding in ("greedy", "sampled")]
    assert [(x["mode"], x["decoding"]) for x in outcomes] == ways
    assert all(x["completions"] == 5 for x in outcomes)
    assert "unique log-probs" in capsys.readouterr().out


def test_failure_if_the_batch_matters(monkeypatch):
    class ByBatch(example.Choose):
        def __call__(self, input_ids, scores):
            return super().__call__(input_ids, scores * len(scores))

    monkeypatch.setattr(example, "Choose", ByBatch)
    monkeypatch.setattr(example, "set_batch_invariant_mode", lambda enabled: nullcontext())
    assert example.main([]) == 1


def test_batches():
    """The prompt is in every batch, the others are others."""
    work = example.batches(40, 8, 100, "cpu", seed=1)
    assert sum(len(batch.rows) for batch in work) == 40
    assert len({len(batch.ids) for batch in work}) > 1
    prompts, others = set(), set()
    for batch in work:
        for i, (ids, mask) in enumerate(zip(batch.ids, batch.mask, strict=True)):
            (prompts if i in batch.rows else others).add(tuple(ids[mask == 1].tolist()))
    assert len(prompts) == 1
    assert not prompts & others
