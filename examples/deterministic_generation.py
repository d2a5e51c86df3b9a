"""Does a prompt's completion depend on what else the server is doing? `python -m examples.deterministic_generation`.

One prompt is completed many times, in batches of random size beside other prompts of other lengths, as a busy server would:
greedily, and by sampling with a seed that belongs to the request. The model is an unmodified Llama of Hugging Face
transformers with random weights: a billion parameters on a GPU, a tiny one on a CPU. The table counts the different completions
and the different log-probabilities of their tokens. With stock PyTorch there are many; under the mode there is one.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from bi_torch import set_batch_invariant_mode

CONFIGS = {
    "cuda": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    ),
    "cpu": LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    ),
}  # fmt: skip
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
DEFAULTS = {"cuda": {"n": 1000, "tokens": 64, "batch": 128}, "cpu": {"n": 12, "tokens": 4, "batch": 8}}
PROMPT_TOKENS = 12
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Batch:
    """A batch of the server: prompts padded on the left, and which of them are the one in question."""

    ids: Tensor
    mask: Tensor
    rows: list[int]


@dataclass(frozen=True)
class Outcome:
    """What came of one prompt.

    Attributes:
        mode: "off" or "on".
        decoding: "greedy" or "sampled".
        completions: how many were made.
        unique: how many of them differ.
        unique_logprobs: how many sequences of log-probabilities differ in a bit.
        tokens_per_second: of all prompts in the batches.
    """

    mode: str
    decoding: str
    completions: int
    unique: int
    unique_logprobs: int
    tokens_per_second: float


class Choose(LogitsProcessor):
    """Makes the largest score the next token's, and keeps the token's log-probability.

    To sample is to take the largest of log-probability / temperature + noise, the noise being Gumbel's. Every copy of the
    prompt has the same seed, so the same noise; what the other prompts have is nobody's concern.
    """

    def __init__(self, batch: Batch, seed: int | None) -> None:
        self._rows = batch.rows
        self.logprobs: list[Tensor] = []
        self._generator = None if seed is None else torch.Generator(batch.ids.device).manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [B, V] that the next tokens are the largest of."""
        logprobs = scores.float().log_softmax(-1)
        chosen = logprobs
        if self._generator is not None:
            noise = torch.rand(scores.shape[1], generator=self._generator, device=scores.device).log().neg().log().neg()
            chosen = logprobs / TEMPERATURE + noise
        self.logprobs.append(logprobs.gather(1, chosen.argmax(-1, keepdim=True))[self._rows])
        return chosen


def batches(n: int, largest: int, vocabulary: int, device: str, seed: int) -> list[Batch]:
    """`n` copies of a prompt in batches of random size, at random places, the other prompts of random length."""
    numbers, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    prompt = torch.randint(1, vocabulary, (PROMPT_TOKENS,), generator=generator)
    result = []
    while n:
        size = numbers.randint(1, largest)
        rows = sorted(numbers.sample(range(size), min(n, numbers.randint(1, size))))
        n -= len(rows)
        lengths = [PROMPT_TOKENS if i in rows else numbers.randint(1, 2 * PROMPT_TOKENS) for i in range(size)]
        ids = torch.zeros(size, max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, length in enumerate(lengths):
            other = torch.randint(1, vocabulary, (length,), generator=generator)
            ids[i, -length:] = prompt if i in rows else other
            mask[i, -length:] = 1
        result.append(Batch(ids.to(device), mask.to(device), rows))
    return result


def complete(model: LlamaForCausalLM, work: list[Batch], tokens: int, seed: int | None, mode: str) -> Outcome:
    """All batches: greedily, or sampled if there is a seed."""
    completions: set[tuple[int, ...]] = set()
    logprobs: set[tuple[float, ...]] = set()
    total, seconds = 0, 0.0
    for i, batch in enumerate([work[0], *work]):  # the first one twice: it compiles kernels
        choose = Choose(batch, seed)
        start = time.perf_counter()
        ids = model.generate(
            batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([choose]),
        )
        found = ids[batch.rows, -tokens:].tolist(), torch.cat(choose.logprobs, 1).tolist()  # waits for the GPU
        if i:
            seconds += time.perf_counter() - start
            total += len(batch.ids) * tokens
            completions |= set(map(tuple, found[0]))
            logprobs |= set(map(tuple, found[1]))
    decoding = "greedy" if seed is None else "sampled"
    n = sum(len(batch.rows) for batch in work)
    return Outcome(mode, decoding, n, len(completions), len(logprobs), total / seconds)


def table(outcomes: list[Outcome]) -> Table:
    """One line for each way of running."""
    result = Table()
    for name in ("mode", "decoding", "completions", "unique", "unique log-probs", "tokens/s"):
        result.add_column(name, justify="left" if name in ("mode", "decoding") else "right")
    for x in outcomes:
        counts = (str(count) for count in (x.completions, x.unique, x.unique_logprobs))
        result.add_row(x.mode, x.decoding, *counts, f"{x.tokens_per_second:,.0f}")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Complete, count, print; 1 if the mode left more than one completion."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    defaults = DEFAULTS[device]
    parser = argparse.ArgumentParser(prog="python -m examples.deterministic_generation", description=__doc__)
    parser.add_argument("--n", type=int, default=defaults["n"], help="completions of the prompt (%(default)s here)")
    parser.add_argument("--tokens", type=int, default=defaults["tokens"], help="tokens of a completion (%(default)s here)")
    parser.add_argument("--batch", type=int, default=defaults["batch"], help="largest batch (%(default)s here)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled request, and of the batches")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    args = parser.parse_args(arguments)

    console, config = Console(), CONFIGS[device]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[device]).eval()
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    console.print(f"Llama of {model.num_parameters() / 1e6:,.1f}M parameters, {DTYPES[device]}, on {name}", highlight=False)
    work = batches(args.n, args.batch, config.vocab_size, device, args.seed)
    outcomes = []
    for mode in ("off", "on"):
        for seed in (None, args.seed):
            with console.status(f"mode {mode}"), set_batch_invariant_mode(mode == "on"):
                outcomes.append(complete(model, work, args.tokens, seed, mode))
    console.print(table(outcomes))
    if args.json:
        args.json.write_text(json.dumps([asdict(x) for x in outcomes], indent=1) + "\n")
    return 0 if all(x.unique == x.unique_logprobs == 1 for x in outcomes if x.mode == "on") else 1


if __name__ == "__main__":
    sys.exit(main())
