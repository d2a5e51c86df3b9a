"""Unmodified Hugging Face models under the mode: log-probabilities of a sequence do not depend on the batch around it.

Models are built from a configuration with random weights: tiny on a CPU; on a GPU, one of them a Llama of a billion parameters.
"""

import functools

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from benchmarks.model import LLAMA_1B
from bi_torch import set_batch_invariant_mode
from tests.arrays import assert_same, integers

LENGTH, PADDING = 12, 5
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "gpt2": (GPT2LMHeadModel, GPT2Config),
}
EXPERTS = {"qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig)}
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8}
SIZES = {
    "cpu": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96},
    "cuda": {**SMALL, "vocab_size": 4096},
    "cuda llama": LLAMA_1B,
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
each_model = pytest.mark.parametrize("name", MODELS)
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@functools.cache
def model(name: str, device: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    kind, config = (MODELS | EXPERTS)[name]
    size = dict(SIZES.get(f"{device} {name}", SIZES[device]))
    if name == "gpt2":
        del size["intermediate_size"]
    else:
        size.setdefault("num_key_value_heads", size["num_attention_heads"] // 2)
        size.setdefault("head_dim", size["hidden_size"] // size["num_attention_heads"])
    if name in EXPERTS:
        size |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": size["intermediate_size"] // 2}
    torch.manual_seed(0)
    with torch.device(device):
        return kind(config(**size, **IDS)).to(dtype).eval()


def tokens(name: str, device: str, sequences: int = 64, length: int = LENGTH) -> Tensor:
    vocabulary = model(name, device).config.vocab_size
    generator = torch.Generator().manual_seed(sequences)
    return torch.randint(3, vocabulary, (sequences, length), generator=generator).to(device)


def logprobs(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.float32)


@torch.no_grad()
def score(net: PreTrainedModel, ids: Tensor, **options: Tensor) -> Tensor:
    return logprobs(net(ids, **options).logits)


@torch.no_grad()
def decode(net: PreTrainedModel, ids: Tensor) -> Tensor:
    """One token after the other, with a cache of keys and values."""
    cache, steps = None, []
    for i in range(ids.shape[1]):
        out = net(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(logprobs(out.logits))
    return torch.cat(steps, 1)


def surrounded(ids: Tensor, others: Tensor, sequences: int, place: int) -> Tensor:
    """A batch of `sequences`, of which one is `ids` [1, L]."""
    return torch.cat([others[:place], ids, others[place : sequences - 1]])


@on_devices
@each_model
@set_batch_invariant_mode()
def test_alone_and_in_a_batch(name, device):
    net, ids, others = model(name, device), tokens(name, device, 1), tokens(name, device)
    alone = score(net, ids)
    for sequences, place in ((2, 0), (2, 1), (8, 0), (8, 4), (64, 63)):
        together = score(net, surrounded(ids, others, sequences, place))
        assert_same(together[place : place + 1], alone)


@on_devices
@each_model
@set_batch_invariant_mode()
def test_padding(name, device):
    """On either side, beside a longer sequence."""
    net, ids = model(name, device), tokens(name, device, 1)
    alone, longer = score(net, ids), tokens(name, device, 2, LENGTH + PADDING)[:1]
    padding = torch.full((1, PADDING), IDS["pad_token_id"], device=device)
    for parts, real in (((ids, padding), slice(0, LENGTH)), ((padding, ids), slice(PADDING, None))):
        mask = torch.ones(2, LENGTH + PADDING, dtype=torch.long, device=device)
        mask[0] = 0
        mask[0, real] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        both = score(net, torch.cat([torch.cat(parts, 1), longer]), attention_mask=mask, position_ids=positions)
        assert_same(both[:1, real], alone)
        assert_same(both[1:], score(net, longer))


@on_devices
@each_model
@set_batch_invariant_mode()
def test_prefill_and_decode(name, device):
    net, ids = model(name, device), tokens(name, device, 3)
    prefill = score(net, ids)
    assert_same(decode(net, ids), prefill)
    assert_same(decode(net, ids[1:2]), prefill[1:2])


@on_devices
@pytest.mark.parametrize("name", EXPERTS)
@set_batch_invariant_mode()
def test_experts(name, device):
    """A token's experts multiply a group of tokens that depends on the batch."""
    net, ids = model(name, device), tokens(name, device)
    together = score(net, ids)
    assert_same(score(net, ids[5:6]), together[5:6])
    assert_same(score(net, ids[3:10]), together[3:10])
    assert_same(decode(net, ids[5:7]), together[5:7])


@on_devices
@each_model
@set_batch_invariant_mode()
def test_generate(name, device):
    """The library's own generation, in batches that are padded on the left: tokens and scores."""
    net, ids, longer = model(name, device), tokens(name, device, 1), tokens(name, device, 3, LENGTH + PADDING)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    alone = net.generate(ids, attention_mask=torch.ones_like(ids), **options)
    padded = torch.cat([torch.full((1, PADDING), IDS["pad_token_id"], device=device), ids], 1)
    batch = torch.cat([longer[:2], padded, longer[2:]])
    mask = torch.ones_like(batch)
    mask[2, :PADDING] = 0
    together = net.generate(batch, attention_mask=mask, **options)
    assert torch.equal(together.sequences[2, PADDING:], alone.sequences[0])
    for step, wanted in zip(together.logits, alone.logits, strict=True):
        assert_same(step[2:3], wanted)


@pytest.mark.gpu  # `test_compile` compiles a model of every kind of op on a CPU
@pytest.mark.parametrize(("name", "device"), [(name, "cuda") for name in MODELS])
@set_batch_invariant_mode(portable=True)
def test_compiled(name, device, inductor):
    """The bits of the eager model, in every batch; one program for all sizes but a batch of one, which torch singles out."""
    net, ids, others = model(name, device), tokens(name, device, 1), tokens(name, device)
    alone, compiled = score(net, ids), torch.compile(lambda ids: net(ids, use_cache=False).logits, dynamic=True)
    for sequences, place in ((8, 4), (2, 0), (64, 63), *([(1, 0)] if device == "cuda" else [])):
        with torch.no_grad():
            together = logprobs(compiled(surrounded(ids, others, sequences, place)))
        assert_same(together[place : place + 1], alone)


@on_devices
@set_batch_invariant_mode()
def test_gradient_of_the_input(device):
    """The loss of a sequence, differentiated by its embeddings: alone and in a batch."""
    net, ids = model("llama", device), tokens("llama", device, 4)

    def gradient(ids: Tensor) -> Tensor:
        embedded = net.get_input_embeddings()(ids).detach().requires_grad_()
        logits = net(inputs_embeds=embedded).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        return torch.autograd.grad(losses, embedded)[0]

    assert_same(gradient(ids)[2:3], gradient(ids[2:3]))


@on_devices
def test_without_the_mode_they_differ(device):
    """Which the tests above would notice, then."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    net, ids = model("llama", device, dtype), tokens("llama", device, 1)[:, : LENGTH // 2]

    def same() -> bool:
        alone = score(net, ids)
        others = [decode(net, ids)]
        if device == "cuda":
            others.append(score(net, surrounded(ids, tokens("llama", device)[:, : LENGTH // 2], 64, 63))[63:])
        return all(torch.equal(integers(x), integers(alone)) for x in others)

    assert not same()
    with set_batch_invariant_mode():
        assert same()
