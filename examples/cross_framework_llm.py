"""Train in JAX, sample in PyTorch: do they agree on a token's probability? `python -m examples.cross_framework_llm`.

A Llama-style decoder of bytes (`examples/llm`) is trained in JAX on the sources of Python's standard library. Every few steps
PyTorch samples from it: the parameters are shared in memory, each token is computed with a KV cache, in a batch of random size
with random neighbours. JAX then computes the log-probabilities of the same tokens, all sequences at once and without a cache,
as a trainer does that learns from samples. Each line says how far the two are apart: the largest difference of a
log-probability over every token that was sampled and every token that could have been, and the largest KL divergence of the
distributions that tokens were drawn from. With this library both are 0. The same program with the frameworks' own operations,
training and sampling beside it, shows what there is without it.

Without a GPU the model is tiny and takes a minute or two, most of which goes into XLA's compiler; `--size 100m` is for a GPU.
"""

import argparse
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import ModuleType

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from rich.console import Console

import bi_jax
import bi_torch
from bi_bridge import to_torch
from examples.llm import jax_model, jax_stock, torch_model, torch_stock
from examples.llm.config import Config, Training
from examples.llm.text import corpus, excerpts


@dataclass(frozen=True)
class Size:
    """A model and how much it trains and samples.

    Attributes:
        config: the model.
        training: the optimizer.
        batch: sequences of a step.
        length: tokens of a sequence.
        steps: of training.
        every: steps between rounds of sampling.
        sequences: of a round.
        prompt: tokens that a sampled sequence begins with.
        sampled: tokens that are sampled.
    """

    config: Config
    training: Training
    batch: int
    length: int
    steps: int
    every: int
    sequences: int
    prompt: int
    sampled: int


SIZES = {
    "tiny": Size(
        Config(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, hidden=128), Training(), 4, 32, 200, 25, 5, 16, 8
    ),
    "100m": Size(
        Config(layers=10, width=1024, heads=16, kv_heads=4, head_dim=64, hidden=2816),
        Training(lr=3e-4), 16, 512, 400, 40, 24, 64, 128,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Round:
    """What one round of sampling found.

    Attributes:
        step: of training before it.
        loss: the mean since the round before.
        difference: the largest difference of a log-probability between the trainer and the sampler.
        divergence: the largest KL divergence of the sampler's distribution of a token from the trainer's.
        batches: sizes of the sampler's batches.
        text: one of the sequences.
    """

    step: int
    loss: float
    difference: float
    divergence: float
    batches: list[int]
    text: str


def rounds(size: Size, in_jax: ModuleType, in_torch: ModuleType, seed: int = 0) -> Iterator[Round]:
    """Train with the operations `in_jax`, sample with `in_torch`, compare."""
    config, text = size.config, corpus()
    train_step = jax.jit(functools.partial(jax_model.train_step, config=config, training=size.training, ops=in_jax))
    trainer = jax.jit(functools.partial(jax_model.log_probabilities, config=config, start=size.prompt, ops=in_jax))
    params = jnp.asarray(config.initial(seed))
    state = {name: jnp.zeros_like(params) for name in size.training.state()}
    generator, batches = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    losses: list[jax.Array] = []
    for step in range(1, size.steps + 1):
        tokens = excerpts(text, size.batch, size.length + 1, generator)
        params, state, loss = train_step(params, state, jnp.int32(step), jnp.asarray(tokens))
        losses.append(loss)
        if step % size.every:
            continue
        shared = to_torch(params)  # the trainer's own memory
        device = shared.device
        prompts = torch.from_numpy(excerpts(text, size.sequences, size.prompt, generator)).to(device)
        uniforms = torch.from_numpy(generator.random((size.sequences, size.sampled))).to(device)
        sampled, by_sampler, sizes = torch_model.generate(shared, config, prompts, uniforms, batches, in_torch)
        by_trainer = to_torch(trainer(params, tokens=jnp.asarray(sampled.cpu().numpy())))
        shown = bytes(sampled[0].cpu().numpy().astype(np.uint8)).decode(errors="replace")
        yield Round(step, fmean(map(float, losses)), *distance(by_sampler, by_trainer), sizes, shown)
        losses.clear()


def distance(by_sampler: torch.Tensor, by_trainer: torch.Tensor) -> tuple[float, float]:
    """The largest difference, and the largest KL divergence, of log-probabilities [N, T, vocab]."""
    p, q = by_sampler.double(), by_trainer.double()
    return float((p - q).abs().max()), float((p.exp() * (p - q)).sum(-1).max())


def plot(ours: list[Round], stock: list[Round], path: Path) -> None:
    """Losses, and distances on a scale that has a 0."""
    mpl.use("Agg")
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 7), sharex=True, layout="constrained", height_ratios=(2, 3))
    least = min((x for r in stock for x in (r.difference, r.divergence) if x > 0), default=1e-9)
    for name, found, color in (("this library", ours, "tab:blue"), ("stock operations", stock, "tab:red")):
        steps = [r.step for r in found]
        above.plot(steps, [r.loss for r in found], color=color, label=name)
        below.plot(steps, [r.difference for r in found], "o-", color=color, label=f"{name}: largest difference")
        below.plot(steps, [r.divergence for r in found], "s--", color=color, label=f"{name}: KL divergence")
    above.set_ylabel("training loss")
    above.legend()
    below.set_yscale("symlog", linthresh=least)
    below.set(xlabel="step", ylabel="trainer against sampler")
    below.set_ylim(-least / 4, None)
    below.legend(loc="center right", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(size: Size, console: Console, seed: int = 0) -> tuple[list[Round], list[Round]]:
    """Run both, with a line for every round."""
    widths = {"step": 5, "loss": 7, "batches": 9, "max |difference|": 17, "KL divergence": 14, "loss*": 8}
    widths |= {"max |difference|*": 18, "KL divergence*": 15}
    console.print("".join(name.rjust(width) for name, width in widths.items()), style="bold")
    ours, stock = [], []
    for one, other in zip(rounds(size, bi_jax, bi_torch, seed), rounds(size, jax_stock, torch_stock, seed), strict=True):
        ours.append(one)
        stock.append(other)
        cells = [f"{one.step}", f"{one.loss:.3f}", f"{min(one.batches)}..{max(one.batches)}"]
        cells += [f"{one.difference:.3g}", f"{one.divergence:.3g}"]
        cells += [f"{other.loss:.3f}", f"{other.difference:.3g}", f"{other.divergence:.3g}"]
        console.print("".join(x.rjust(width) for x, width in zip(cells, widths.values(), strict=True)), highlight=False)
    return ours, stock


def main(arguments: list[str] | None = None) -> int:
    """Run, print, plot; 1 if the trainer and the sampler of this library ever disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model; 100m is for a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, text, samples and batches")
    parser.add_argument("--plot", type=Path, default=Path("cross_framework_llm.png"), help="file that the plot is written to")
    options = parser.parse_args(arguments)
    size, console = SIZES[options.size], Console(soft_wrap=True)
    console.print(
        f"{size.config.parameters():,} parameters, {size.steps} steps in JAX on {jax.devices()[0].device_kind}; every "
        f"{size.every} steps PyTorch samples {size.sampled} tokens of {size.sequences} sequences (*: stock operations)",
        highlight=False,
    )
    ours, stock = report(size, console, options.seed)
    plot(ours, stock, options.plot)
    compared = len(ours) * size.sequences * size.sampled
    differing = sum(r.difference != 0 or r.divergence != 0 for r in ours)
    console.print(f"{compared:,} tokens compared, {compared * size.config.vocab:,} log-probabilities; plot: {options.plot}")
    console.print(f"sampled: {ours[-1].text!r}", highlight=False, markup=False)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
