"""The bridge shares memory or says why it cannot; it never copies, narrows or reorders behind the caller's back."""

import collections
import gc
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bi_bridge import to_jax, to_torch, tree_to_jax, tree_to_torch

NARROW = [
    torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32,
    torch.bool,
]  # fmt: skip
WIDE = [torch.float64, torch.int64, torch.uint64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sample(dtype: torch.dtype, *shape: int, device: str = "cpu") -> torch.Tensor:
    raw = torch.arange(math.prod(shape) * dtype.itemsize, dtype=torch.int64) * 37 % 251
    raw = raw % 2 if dtype is torch.bool else raw
    return raw.to(torch.uint8).view(dtype).reshape(shape).to(device)


def same_memory(tensor: torch.Tensor, array: jax.Array) -> bool:
    return tensor.data_ptr() == array.unsafe_buffer_pointer()


def same_bits(tensor: torch.Tensor, array: jax.Array) -> bool:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() == np.asarray(array).tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", NARROW, ids=name_of)
def test_shares_both_ways(dtype: torch.dtype, device: str) -> None:
    tensor = sample(dtype, 5, 16, device=device)
    array = to_jax(tensor)
    assert array.dtype == name_of(dtype)
    assert array.shape == tensor.shape
    assert same_memory(tensor, array)
    assert same_bits(tensor, array)
    back = to_torch(array)
    assert back.dtype is dtype
    assert back.device == tensor.device
    assert back.shape == tensor.shape
    assert back.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", NARROW, ids=name_of)
def test_copy_owns_its_memory(dtype: torch.dtype, device: str) -> None:
    tensor = sample(dtype, 5, 16, device=device)
    array = to_jax(tensor, copy=True)
    assert not same_memory(tensor, array)
    assert same_bits(tensor, array)
    copied = to_torch(array, copy=True)
    assert not same_memory(copied, array)
    assert same_bits(copied, array)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", WIDE, ids=name_of)
def test_64_bit_dtypes(dtype: torch.dtype, device: str) -> None:
    tensor = torch.arange(16).to(device, dtype)
    with pytest.raises(ValueError, match=f"JAX would narrow {dtype} .* while its x64 mode is off.*copy=True"):
        to_jax(tensor)
    assert to_jax(tensor, copy=True).tolist() == tensor.tolist()
    with jax.enable_x64(True):
        array = to_jax(tensor)
        assert array.dtype == name_of(dtype)
        assert same_memory(tensor, array)
        copied = to_jax(tensor, copy=True)
        assert copied.dtype == name_of(dtype)
        assert not same_memory(tensor, copied)
    back = to_torch(array)
    assert back.dtype is dtype
    assert back.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1, 2**31]),
        torch.tensor([-(2**31) - 1]),
        torch.tensor([2**63], dtype=torch.uint64),
        torch.tensor([0.1], dtype=torch.float64),
        torch.tensor([1e300], dtype=torch.float64),
    ],
    ids=repr,
)
def test_a_copy_does_not_change_values(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        to_jax(tensor, copy=True)


def test_a_copy_keeps_special_values() -> None:
    tensor = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 2.0**-149], dtype=torch.float64)
    assert same_bits(tensor.float(), to_jax(tensor, copy=True))


@pytest.mark.parametrize("device", DEVICES)
def test_dimensions_in_any_order(device: str) -> None:
    base = sample(torch.float32, 4, 8, 16, device=device)
    for view in (base.permute(2, 0, 1), base.transpose(0, 1), base[1], base[1:], base[:1], base.unsqueeze(1).transpose(0, 1)):
        array = to_jax(view)
        assert same_memory(view, array)
        assert array.shape == view.shape
        assert same_bits(view, array)
        back = to_torch(array)
        assert back.data_ptr() == view.data_ptr()
        assert torch.equal(back, view)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("make_view", "reason"),
    [
        (lambda t: t[:, :8], r"strides \(16, 1\) of shape \(4, 8\) leave gaps or overlap"),
        (lambda t: t[::2], "leave gaps or overlap"),
        (lambda t: t[:1].expand(4, 16), r"strides \(0, 1\)"),
        (lambda t: t.flatten().as_strided((4, 4), (1, 1)), "overlap"),
        (lambda t: t.flatten()[1:], "4 bytes past a multiple of"),
        (lambda t: torch.view_as_complex(t.reshape(4, 8, 2)).conj().imag, "negative bit"),
    ],
    ids=["columns", "rows", "expanded", "overlapping", "misaligned", "negated"],
)
def test_layouts_that_need_a_copy(make_view, reason: str, device: str) -> None:
    view = make_view(sample(torch.int16, 4, 32, device=device).float()[:, :16].contiguous())
    with pytest.raises(ValueError, match=rf"to_jax: cannot share memory: .*{reason}.*; pass copy=True"):
        to_jax(view)
    array = to_jax(view, copy=True)
    assert array.tolist() == view.tolist()


def test_alignment_of_small_views() -> None:
    flat = torch.arange(64, dtype=torch.float32)
    assert same_memory(flat[16:], to_jax(flat[16:]))
    with pytest.raises(ValueError, match="32 bytes past a multiple of 64"):
        to_jax(flat[8:])


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1, 1)])
def test_scalars_and_empty(shape: tuple[int, ...]) -> None:
    tensor = torch.full(shape, 2.5)
    array = to_jax(tensor)
    assert array.shape == shape
    back = to_torch(array)
    assert torch.equal(back, tensor)
    assert torch.equal(to_torch(jnp.full(shape, 2.5)), tensor)
    assert torch.equal(to_torch(to_jax(tensor, copy=True), copy=True), tensor)


@pytest.mark.parametrize("device", DEVICES)
def test_writes_are_seen(device: str) -> None:
    tensor = torch.ones(4, 16, device=device)
    array = to_jax(tensor)
    tensor.mul_(3)
    if device == "cuda":
        torch.cuda.synchronize()
    assert float(array.sum()) == 3 * 64
    copied = to_jax(tensor, copy=True)
    tensor.zero_()
    assert float(copied.sum()) == 3 * 64

    source = jnp.ones((4, 16), device=jax.devices(device)[0])
    shared = to_torch(source)
    shared.add_(1)
    if device == "cuda":
        torch.cuda.synchronize()
    assert float(source.sum()) == 2 * 64


def test_donation_leaves_shared_memory_alone_on_a_cpu() -> None:
    double = jax.jit(lambda x: x * 2, donate_argnums=0)
    tensor = torch.ones(4, 16)
    assert float(double(to_jax(tensor)).sum()) == 128
    assert float(tensor.sum()) == 64

    source = jnp.ones((4, 16))
    shared = to_torch(source)
    assert float(double(source).sum()) == 128
    assert float(shared.sum()) == 64


@pytest.mark.parametrize("device", DEVICES)
def test_either_may_be_dropped_first(device: str) -> None:
    tensor = torch.full((1024,), 7.0, device=device)
    array = to_jax(tensor)
    del tensor
    gc.collect()
    torch.zeros(1024, device=device)
    assert float(array.sum()) == 7 * 1024
    back = to_torch(array)
    del array
    gc.collect()
    assert float(back.sum()) == 7 * 1024


def test_parameters_are_detached() -> None:
    layer = torch.nn.Linear(16, 4)
    array = to_jax(layer.weight)
    assert same_memory(layer.weight, array)
    assert not to_torch(array).requires_grad
    assert layer.weight.requires_grad
    intermediate = layer.weight * 2
    assert same_bits(intermediate.detach(), to_jax(intermediate))


def test_trees() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 16).bfloat16())
    state = model.state_dict()
    tree = tree_to_jax(state)
    assert list(tree) == list(state)
    assert all(same_memory(state[key], tree[key]) for key in state)
    back = tree_to_torch(tree)
    assert isinstance(back, collections.OrderedDict)
    assert all(back[key].data_ptr() == state[key].data_ptr() for key in state)
    model.load_state_dict(back)

    nested = {"layers": [{"w": torch.ones(2, 2)}, {"w": torch.zeros(3)}], "head": (torch.ones(1), None)}
    tree = tree_to_jax(nested)
    assert jax.tree.structure(tree) == jax.tree.structure(nested)
    assert same_memory(nested["layers"][1]["w"], tree["layers"][1]["w"])
    assert not same_memory(nested["head"][0], tree_to_jax(nested, copy=True)["head"][0])
    assert jax.tree.structure(tree_to_torch(tree, copy=True)) == jax.tree.structure(nested)


def test_tree_errors_name_the_leaf() -> None:
    with pytest.raises(ValueError, match="x64 mode is off") as caught:
        tree_to_jax({"norm": {"steps": torch.tensor(3)}})
    assert caught.value.__notes__ == ["at leaf ['norm']['steps']"]
    with pytest.raises(TypeError, match="must be a jax.Array, got float") as caught_type:
        tree_to_torch([jnp.ones(2), 1.0])
    assert caught_type.value.__notes__ == ["at leaf [1]"]


def fake_tensor() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(4)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (lambda: [1.0], TypeError, "must be a torch.Tensor .*got list"),
        (lambda: np.ones(3), TypeError, "got ndarray"),
        (lambda: jnp.ones(3), TypeError, "got ArrayImpl"),
        (fake_tensor, TypeError, "got FakeTensor"),
        (lambda: torch.empty(4, device="meta"), ValueError, "on meta, expected a CPU or CUDA device"),
        (lambda: torch.eye(4).to_sparse(), ValueError, "must be dense, got layout torch.sparse_coo"),
        (lambda: torch.eye(4).to_sparse_csr(), ValueError, "must be dense, got layout torch.sparse_csr"),
        (lambda: torch.zeros(4, dtype=torch.complex64), TypeError, "unsupported dtype torch.complex64"),
        (lambda: torch.zeros(4, dtype=torch.float8_e4m3fn), TypeError, "unsupported dtype torch.float8_e4m3fn"),
    ],
    ids=["list", "numpy", "jax", "fake", "meta", "coo", "csr", "complex", "float8"],
)
def test_to_jax_refuses(make, error: type[Exception], reason: str, copy: bool) -> None:
    with pytest.raises(error, match=f"to_jax: .*{reason}"):
        to_jax(make(), copy=copy)


def deleted() -> jax.Array:
    array = jnp.ones(4)
    array.delete()
    return array


def donated() -> jax.Array:
    array = jnp.ones(4)
    jax.jit(lambda x: x * 2, donate_argnums=0)(array)
    return array


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (lambda: [1.0], TypeError, "must be a jax.Array, got list"),
        (lambda: np.ones(3), TypeError, "got ndarray"),
        (lambda: torch.ones(3), TypeError, "got Tensor"),
        (lambda: jnp.zeros(4, jnp.complex64), TypeError, "unsupported dtype complex64"),
        (lambda: jnp.zeros(4, jnp.int4), TypeError, "unsupported dtype int4"),
        (lambda: jax.random.key(0), TypeError, "unsupported dtype key"),
        (deleted, RuntimeError, "deleted, or donated"),
        (donated, RuntimeError, "deleted, or donated"),
    ],
    ids=["list", "numpy", "torch", "complex", "int4", "key", "deleted", "donated"],
)
def test_to_torch_refuses(make, error: type[Exception], reason: str, copy: bool) -> None:
    with pytest.raises(error, match=f"to_torch: .*{reason}"):
        to_torch(make(), copy=copy)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap])
def test_to_torch_refuses_tracers(transform) -> None:
    with pytest.raises(TypeError, match="to_torch: array is a tracer"):
        transform(to_torch)(jnp.ones(()) if transform is jax.grad else jnp.ones(4))


@pytest.mark.parametrize("spec", ["x", None])
def test_to_torch_refuses_sharded_arrays(spec: str | None) -> None:
    devices = jax.devices("cpu")[:2]
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices), "x"), jax.sharding.PartitionSpec(spec))
    with pytest.raises(ValueError, match="to_torch: array is sharded over 2 devices, a tensor has one"):
        to_torch(jax.device_put(np.ones(4, np.float32), sharding))


@pytest.mark.gpu
def test_streams_are_respected() -> None:
    """A long queue of work before the moment of sharing, on a stream of its own, with no synchronisation."""
    square = jax.jit(lambda x: x @ x)
    for _ in range(10):
        with torch.cuda.stream(torch.cuda.Stream()):
            tensor = torch.zeros(4096, 4096, device="cuda")
            for _ in range(50):
                tensor += 1
            array = to_jax(tensor)
        assert bool((array == 50).all())

        source = jnp.full((4096, 4096), 2.0**-12)
        for _ in range(20):
            source = square(source)  # 2^-12 everywhere is a fixed point
        assert bool((to_torch(source) == 2.0**-12).all())


@pytest.mark.gpu
def test_pinned_memory_needs_a_copy() -> None:
    tensor = torch.ones(16).pin_memory()
    with pytest.raises(ValueError, match="page-locked"):
        to_jax(tensor)
    array = to_jax(tensor, copy=True)
    assert array.tolist() == tensor.tolist()
    assert array.device.platform == "cpu"


@pytest.mark.gpu
def test_views_that_a_gpu_aligns() -> None:
    flat = torch.arange(1024, dtype=torch.float32, device="cuda")
    view = flat[4:]  # 16 bytes on
    array = to_jax(view)
    assert same_memory(view, array)
    assert float((array * 2).sum()) == float((view * 2).sum())
