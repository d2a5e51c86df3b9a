"""scaled_dot_product_attention: its contract in NumPy, both frameworks, and what the batch and masked keys must not change."""

import math
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import bi_jax.attention.op
import bi_torch
from bi_torch.attention import calls, library
from bi_torch.attention import keys as key_orders
from shared_specs.attention import attention_layout
from shared_specs.formats import FORMATS
from shared_specs.reference.attention import attention, attention_gradients
from tests.arrays import NAMES, assert_same, draw, to_bits, to_torch
from tests.model_engines import model_engines

attend = bi_torch.scaled_dot_product_attention
NAN = math.nan

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

B, HEADS, KV_HEADS, LQ, LK, E, EV = 2, 4, 2, 9, 21, 8, 6
"""More keys, and more rows that share them, than one step of the dot instruction takes."""


def operands(dtype="bfloat16", kind="normal", queries=LQ, keys=LK):
    """Heads that share keys ask the same here, so that `cotangents` cancel."""
    shapes = (B, KV_HEADS, queries, E), (B, KV_HEADS, keys, E), (B, KV_HEADS, keys, EV)
    query, key, value = (draw(*shape, dtype=dtype, kind=kind, seed=i) for i, shape in enumerate(shapes))
    return [query.repeat_interleave(HEADS // KV_HEADS, 1), key, value]


def cotangents(dtype="bfloat16", queries=LQ):
    """Large ones that cancel between heads: of what lies beside them, bits are lost that depend on the order of a sum."""
    g = draw(B, HEADS, queries, EV, dtype=dtype, seed=7)
    g[:, ::2, ::2] = 2**10 if dtype == "float16" else 2**20
    g[:, 1::2, ::2] = -g[:, ::2, ::2]
    return g


def some(*shape, share=0.6, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def causal(queries=LQ, keys=LK):
    """Aligned at the last query and key, as in a decoder with a cache."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def left_padded():
    return causal() & (torch.arange(LK) >= torch.tensor([0, 18])[:, None])[:, None, None]


def added(admitted, dtype):
    """A float mask that leaves out the same keys."""
    return draw(*admitted.shape, dtype=dtype, seed=9).masked_fill(~admitted, -math.inf)


MASKS = {
    "none": lambda dtype: None,
    "causal": lambda dtype: None,
    "keys": lambda dtype: some(B, 1, 1, LK),
    "left padding": lambda dtype: left_padded(),
    "any": lambda dtype: some(LQ, LK),
    "any of each head": lambda dtype: some(B, HEADS, LQ, LK),
    "added": lambda dtype: draw(HEADS, 1, LK, dtype=dtype, seed=9),
    "added left padding": lambda dtype: added(left_padded(), dtype),
    "added any": lambda dtype: added(some(HEADS, LQ, LK), "float32"),
}


def by_head(mask, is_causal):
    """(admitted, added or None) as [B, HEADS, LQ, LK] in NumPy."""
    shape = (B, HEADS, LQ, LK)
    if mask is None:
        admitted = np.tril(np.ones((LQ, LK), bool)) if is_causal else np.ones((LQ, LK), bool)
        return np.broadcast_to(admitted, shape), None
    if mask.dtype == torch.bool:
        return np.broadcast_to(mask.numpy(), shape), None
    values = mask.detach().float().numpy()
    return np.broadcast_to(values != -np.inf, shape), np.broadcast_to(values, shape)


def expected(dtype, mask, is_causal, scale, tensors, cotangent):
    """Output and gradients of query, key, value, and of the scores, by the reference model; keys summed over their heads."""
    fmt = FORMATS[dtype]
    query, key, value, g = map(to_bits, (*tensors, cotangent))
    admitted, mask = by_head(mask, is_causal)
    y = np.zeros((B, HEADS, LQ, EV), fmt.storage)
    dq, ds = np.zeros(query.shape, fmt.storage), np.zeros((B, HEADS, LQ, LK), fmt.storage)
    dk, dv = np.zeros(key.shape, fmt.storage), np.zeros(value.shape, fmt.storage)
    group = HEADS // KV_HEADS
    for b in range(B):
        for h in range(KV_HEADS):
            heads = slice(h * group, (h + 1) * group)

            def rows(x, b=b, heads=heads):
                """Query after query, for each the heads."""
                return x[b, heads].swapaxes(0, 1).reshape(group * LQ, -1)

            def back(x):
                return x.reshape(LQ, group, -1).swapaxes(0, 1)

            plus = None if mask is None else rows(mask)
            args = rows(query), key[b, h], value[b, h], rows(admitted), plus, scale, fmt
            y[b, heads] = back(attention(*args))
            dquery, dk[b, h], dv[b, h], dscores = attention_gradients(*args, rows(g))
            dq[b, heads], ds[b, heads] = back(dquery), back(dscores)
    return [to_torch(x, fmt) for x in (y, dq, dk, dv, ds)]


@contextmanager
def path(monkeypatch, name):
    """On a GPU composed, in small chunks, or with an order for every row, as while a CUDA graph is captured."""
    with monkeypatch.context() as patch:
        patch.setattr(calls, "CALLS", {})
        if name in ("composed", "chunks"):
            patch.setattr(calls, "strides_of", lambda *operands: None)
        if name == "chunks":
            patch.setattr(library, "CHUNK", 7 * LK)
            patch.setattr(library, "CAUSAL_BLOCK", 2)
        if name == "capture":
            patch.setattr(library, "mask_keys", lambda mask, admitted: key_orders.find_keys(admitted, look=None))
        yield


CASES = dict(zip(MASKS, ("float32", *["bfloat16", "float16"] * 4), strict=True))


@devices
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name, device, monkeypatch):
    dtype, is_causal, scale = CASES[name], name == "causal", 0.3
    mask, tensors, g = MASKS[name](dtype), operands(dtype), cotangents(dtype)
    y, *gradients, dscores = expected(dtype, mask, is_causal, scale, tensors, g)
    inputs = [x.to(device).requires_grad_() for x in tensors]
    if mask is not None:
        mask = mask.to(device)
        if mask.is_floating_point():
            inputs.append(mask.requires_grad_())
            gradients.append(of_mask(dscores, mask))
    for how in ("whole", *(["composed"] if device == "cuda" else []), "chunks", "capture"):
        with path(monkeypatch, how):
            out = attend(*inputs[:3], mask, is_causal=is_causal, scale=scale, enable_gqa=True)
            assert out.is_contiguous()
            assert_same(out.cpu(), y)
            for actual, wanted in zip(torch.autograd.grad(out, inputs, g.to(device)), gradients, strict=True):
                assert_same(actual.cpu(), wanted)


def of_mask(dscores, mask):
    """The gradient of a mask: that of the scores, summed where it was broadcast."""
    shape = (1,) * (4 - mask.dim()) + mask.shape
    dims = [i for i, n in enumerate(shape) if n != dscores.shape[i]]
    return (bi_torch.sum(dscores, dim=dims, dtype=mask.dtype) if dims else dscores.to(mask.dtype)).reshape(mask.shape)


@devices
@pytest.mark.parametrize("name", MASKS)
def test_the_function_is_that_of_torch(name, device):
    """Within the error of float32, rows that admit nothing included."""
    tensors, mask, g = operands("float32"), MASKS[name]("float32"), draw(B, HEADS, LQ, EV, dtype="float32", seed=7)
    if mask is not None and mask.dtype == torch.bool and mask.shape[-2] > 1:
        mask[..., 1, :] = False
    options = {"attn_mask": None if mask is None else mask.to(device), "is_causal": name == "causal", "enable_gqa": True}
    results = []
    for function in (attend, F.scaled_dot_product_attention):
        inputs = [x.to(device).requires_grad_() for x in tensors]
        out = function(*inputs, **options)
        results.append([out, *torch.autograd.grad(out, inputs, g.to(device))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------- what changes nothing


@devices
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_row_alone_and_in_a_batch(dtype, device):
    query, key, value = (x.to(device) for x in operands(dtype))
    mask = some(B, HEADS, LQ, LK).to(device)
    together = attend(query, key, value, mask, enable_gqa=True)
    for b, h, i in ((0, 0, 0), (1, 3, 4), (0, 1, 2)):
        alone = attend(query[b, h, i : i + 1], key[b, h // 2], value[b, h // 2], mask[b, h, i : i + 1])
        assert_same(together[b, h, i : i + 1], alone)


@devices
@pytest.mark.parametrize("dtype", FORMATS)
def test_prefill_and_decode(dtype, device):
    """A causal prefill, the steps of a cache that grows, and those of a cache of fixed size whose rest is NaN."""
    query, key, value = (x.to(device) for x in operands(dtype, queries=LK))
    prefill = attend(query, key, value, is_causal=True, enable_gqa=True)
    for i in range(0, LK, 4):
        step, past = query[:, :, i : i + 1], slice(0, i + 1)
        assert_same(prefill[:, :, i : i + 1], attend(step, key[:, :, past], value[:, :, past], enable_gqa=True))
    static = [torch.full_like(x, NAN) for x in (key, value)]
    for i in range(0, LK, 7):
        for cache, x in zip(static, (key, value), strict=True):
            cache[:, :, : i + 1] = x[:, :, : i + 1]
        filled = (torch.arange(LK, device=device) <= i)[None]
        assert_same(prefill[:, :, i : i + 1], attend(query[:, :, i : i + 1], *static, filled, enable_gqa=True))


@devices
@pytest.mark.parametrize("kind", ["left", "right", "gaps"])
def test_padding_takes_no_place(kind, device):
    """A causal sequence of 16 and the same one spread over 21 places, the rest of which is NaN or inf; gradients too."""
    query, key, value = (x.to(device)[:, :, :16] for x in operands(queries=LK))
    g = cotangents(queries=16).to(device)
    admitted = {"left": torch.arange(LK) >= LK - 16, "right": torch.arange(LK) < 16, "gaps": torch.arange(LK) % 4 != 3}[kind]
    places = admitted.nonzero()[:16, 0].to(device)
    admitted = torch.zeros(LK, dtype=torch.bool, device=device).index_fill(0, places, True)
    plain = [x.clone().requires_grad_() for x in (query, key, value)]
    expected = attend(*plain, is_causal=True, enable_gqa=True)
    spread = []
    for x, rest in zip(plain, (NAN, math.inf, NAN), strict=True):
        padded = torch.full((*x.shape[:2], LK, x.shape[3]), rest, dtype=x.dtype, device=device)
        spread.append(padded.index_copy(2, places, x.detach()).requires_grad_())
    mask = causal(LK).to(device) & admitted & admitted[:, None]
    out = attend(*spread, mask, enable_gqa=True)
    assert_same(out[:, :, places], expected)
    assert not to_bits(out[:, :, ~admitted].cpu()).any()
    cotangent = torch.full_like(out, NAN).index_copy(2, places, g)
    ours = torch.autograd.grad(out, spread, cotangent)
    dquery, *of_keys = torch.autograd.grad(expected, plain, g)
    assert_same(ours[0][:, :, places], dquery)
    assert not any(to_bits(x[:, :, ~admitted].cpu()).any() for x in ours)
    if kind == "right":  # the sum over queries has no leading zeros there
        for actual, wanted in zip(ours[1:], of_keys, strict=True):
            assert_same(actual[:, :, places], wanted)


@devices
@pytest.mark.parametrize("how", ["whole", "capture"])
def test_values_that_are_not_finite(how, device, monkeypatch):
    """NaN in their column of the rows that admit them, and nowhere else."""
    query, key, value = (x.to(device) for x in operands())
    value[0, 0, 2, 1], value[0, 0, 3, 4] = NAN, -math.inf
    clean = value.nan_to_num(0.0, 0.0, 0.0)
    for options in ({"is_causal": True}, {"attn_mask": causal(LQ, LK).to(device).roll(-LK + LQ, 1)}):
        with path(monkeypatch, how):
            out, wanted = (attend(query, key, x, **options, enable_gqa=True) for x in (value, clean))
        reached = torch.zeros_like(out, dtype=torch.bool)
        reached[0, :2, 2:, 1] = reached[0, :2, 3:, 4] = True
        assert_same(out, torch.where(reached, canonical_nan(out), wanted))
    assert attend(query, key, value, enable_gqa=True)[0, 0].isnan().sum() == 2 * LQ


def canonical_nan(like):
    bits = torch.int32 if like.dtype == torch.float32 else torch.int16
    return torch.full_like(like, torch.iinfo(bits).max, dtype=bits).view(like.dtype)


@devices
def test_scores_that_are_not_finite(device):
    """As torch: zeros where every score is -inf, NaN beside a score that is NaN."""
    query, key, value = torch.ones(1, 1, E), torch.full((1, 3, E), -math.inf), torch.ones(1, 3, EV)
    lost = key.clone()
    lost[0, 1, 0] = NAN
    for keys in (key, lost):
        ours, theirs = (
            f(query.to(device), keys.to(device), value.to(device)) for f in (attend, F.scaled_dot_product_attention)
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)


@devices
def test_broadcast_batch_dimensions(device):
    """Any operand may be repeated; its gradient is the sum over the repetitions."""
    shapes = (3, 1, 2, LQ, E), (1, 4, 1, LK, E), (1, 4, 2, LK, EV)
    tensors = [draw(*shape, dtype="float32", seed=i).to(device) for i, shape in enumerate(shapes)]
    g, full = draw(3, 4, 2, LQ, EV, dtype="float32", seed=7).to(device), (3, 4, 2)
    results = []
    for function in (attend, F.scaled_dot_product_attention):
        inputs = [x.clone().requires_grad_() for x in tensors]
        given = inputs if function is attend else [x.expand(*full, *x.shape[-2:]) for x in inputs]
        out = function(*given, some(LQ, LK).to(device))
        results.append([out, *torch.autograd.grad(out, inputs, g)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    one = [x.expand(*full, *x.shape[-2:])[2, 3, 1] for x in tensors]
    assert_same(results[0][0][2, 3, 1], attend(*one, some(LQ, LK).to(device)))


def test_empty_extents():
    query, key, value = operands()
    assert not attend(query, key[:, :, :0], value[:, :, :0], enable_gqa=True).any()
    assert attend(query[:, :, :0], key, value, enable_gqa=True).shape == (B, HEADS, 0, EV)
    assert attend(query[:0], key[:0], value[:0], enable_gqa=True).shape == (0, HEADS, LQ, EV)


# ------------------------------------------------------------------------------------------------------------- mechanics


def test_what_was_seen_of_a_mask_is_kept_while_it_lives():
    found, seen = [], key_orders.Seen()

    def look(mask, more=()):
        return seen.get(mask, more, lambda: found.append(mask.sum()) or key_orders.Keys(None))

    mask = some(LQ, LK)
    assert look(mask) is look(mask.view(LQ, LK)) is look(mask)
    assert len(found) == 1
    look(mask[1:])
    look(mask, more=(1,))
    assert len(found) == 3
    mask[0, 0] = not mask[0, 0]
    look(mask)
    assert len(found) == 4
    del mask
    look(some(LQ, LK))
    assert len(found) == 5
    assert len(seen) == 1


@pytest.mark.gpu
def test_a_wait_for_the_gpu_once_a_mask():
    query, key, value = (x.cuda() for x in operands())
    padded, step = left_padded().cuda(), some(B, 1, 1, LK).cuda()
    expected = attend(query, key, value, padded, enable_gqa=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = attend(query, key, value, padded[:], enable_gqa=True)
        attend(query, key, value, is_causal=True, enable_gqa=True)
        attend(query, key, value, step, enable_gqa=True)
        with pytest.raises(RuntimeError, match="synchronizing"):
            attend(query, key, value, padded.clone(), enable_gqa=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(again, expected)


@pytest.mark.gpu
def test_cuda_graph(monkeypatch):
    """Replayed with other operands and another mask, of another kind."""
    tensors = [x.cuda() for x in (*operands(), left_padded().clone())]
    with path(monkeypatch, "capture"):
        attend(*tensors, enable_gqa=True)  # compiles kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*tensors, enable_gqa=True)
    for mask in (left_padded(), some(B, 1, LQ, LK)):
        for x, new in zip(tensors, (*operands(kind="wide"), mask), strict=True):
            x.copy_(new)
        graph.replay()
        assert_same(out, attend(*(x.clone() for x in tensors), enable_gqa=True))


def test_registered_op():
    query, key, value = (x.requires_grad_() for x in operands())
    mask = draw(LQ, LK).requires_grad_()
    arguments = (query, key, value, mask, False, 0.3, True)
    opcheck(torch.ops.bi_torch.scaled_dot_product_attention.default, arguments, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": None}, TypeError, "query must be"),
        ({"key": torch.ones(2, 3, 4)}, RuntimeError, "key must be torch.bfloat16"),
        ({"value": draw(B, KV_HEADS, LK - 1, EV)}, RuntimeError, "one value for every key"),
        ({"key": draw(B, KV_HEADS, LK, E + 1)}, RuntimeError, "one head dimension"),
        ({"query": draw(B, 3, LQ, E)}, RuntimeError, "multiple of those of key"),
        ({"query": draw(B + 1, HEADS, LQ, E)}, RuntimeError, "batch dimensions do not broadcast"),
        ({"enable_gqa": False}, RuntimeError, "batch dimensions do not broadcast"),
        ({"attn_mask": some(LQ, LK + 1)}, RuntimeError, "does not broadcast to"),
        ({"attn_mask": torch.ones(LQ, LK, dtype=torch.int32)}, RuntimeError, "attn_mask must be torch.bool"),
        ({"attn_mask": some(LQ, LK), "is_causal": True}, RuntimeError, "attn_mask must be None"),
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p must be 0"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(zip(("query", "key", "value"), operands(), strict=True)) | {"enable_gqa": True}
    with pytest.raises(error, match=f"bi_torch.scaled_dot_product_attention: .*{message}"):
        attend(**(arguments | change))
    given = {name: in_jax(x) if isinstance(x, torch.Tensor) else x for name, x in (arguments | change).items()}
    error = {RuntimeError: (TypeError, ValueError)}.get(error, error)
    with pytest.raises(error, match="bi_jax.scaled_dot_product_attention: "):
        jax.eval_shape(lambda: bi_jax.scaled_dot_product_attention(**given))


def test_layout():
    """Heads that share keys, and whole batch dimensions that do, are rows of one entry."""
    layout = attention_layout((3, 2, 8, LQ, E), (1, 2, 4, LK, E), (1, 2, 4, LK, EV), (2, 1, LQ, 1), True)
    assert (layout.batch, layout.entries, layout.groups) == ((3, 2, 4, 2), (1, 2), (0, 3))
    assert (layout.entry_count, layout.group_count, layout.out) == (8, 6, (3, 2, 8))
    assert layout.mask == (1, 2, 1, 1, LQ, 1)


# -------------------------------------------------------------------------------------------------------------------- JAX


def in_jax(x):
    """A CPU tensor with its bits."""
    return jnp.asarray(to_bits(x).view(jnp.dtype(NAMES[x.dtype])) if x.dtype in NAMES else x.numpy())


def in_torch(x):
    fmt = FORMATS[x.dtype.name]
    return to_torch(np.asarray(x).view(fmt.storage), fmt)


@pytest.fixture(scope="module")
def engines():
    """The reference model in the place of JAX's engines: their tests are elsewhere, and XLA takes long to compile them."""
    with model_engines():
        yield


def check_jax_with_masks(dtype):
    """One compiled function for all masks, with gradients: padding on either side, and an order for every row."""

    @jax.jit
    def both(mask, g, *tensors):
        y, pull = jax.vjp(lambda *x: bi_jax.scaled_dot_product_attention(*x, enable_gqa=True), *tensors, mask)
        return y, *pull(g)

    g, tensors = cotangents(dtype), operands(dtype)
    for admitted in (left_padded(), some(B, 1, LQ, LK), some(B, 1, LQ, LK, share=0.05), causal().expand(B, 1, LQ, LK)):
        mask = added(admitted, "float32")
        inputs = [x.clone().requires_grad_() for x in (*tensors, mask)]
        y = attend(*inputs, enable_gqa=True)
        wanted = [y.detach(), *torch.autograd.grad(y, inputs, g)]
        for actual, expected in zip(both(*map(in_jax, (mask, g, *tensors))), wanted, strict=True):
            assert_same(in_torch(actual), expected)


@pytest.mark.usefixtures("engines")
def test_jax_with_a_mask_that_is_known_at_run_time():
    check_jax_with_masks("bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FORMATS)
def test_jax_on_a_gpu(dtype):
    assert jax.default_backend() == "gpu"
    check_jax_with_masks(dtype)


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize("name", ["none", "causal", "keys"])
def test_jax_with_keys_that_are_known_before(name, monkeypatch):
    monkeypatch.setattr(bi_jax.attention.op, "CHUNK", 40 * LK)
    monkeypatch.setattr(bi_jax.attention.op, "CAUSAL_BLOCK", 2)
    mask, tensors = MASKS[name]("bfloat16"), operands()
    options = {"is_causal": name == "causal", "enable_gqa": True}
    actual = jax.jit(lambda mask, *x: bi_jax.scaled_dot_product_attention(*x, mask, **options))(
        None if mask is None else in_jax(mask), *map(in_jax, tensors)
    )
    assert_same(in_torch(actual), attend(*tensors, mask, **options))
