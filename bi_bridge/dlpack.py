"""One buffer, seen by PyTorch and by JAX, through the DLPack protocol that both speak.

("dlpack" is the protocol of `__dlpack__` and `from_dlpack`; the PyPI package of that name is unrelated.)

Sharing copies nothing, on a CPU and on a GPU. What cannot be shared as it is raises an error that says why; `copy=True`
asks for a copy instead, and always makes one: the result owns its memory.

Order of work on a GPU. Each framework has streams of its own. At the moment of sharing, the consumer hands its stream to
the producer, and the producer makes that stream wait for the work it has already queued: no synchronisation is needed
before `to_jax` or `to_torch`, and the host does not wait. Work queued after the moment of sharing is not ordered.

In-place writes. JAX takes its arrays to be immutable, PyTorch does not know that they are.

- A write by PyTorch into shared memory changes the JAX array. On a GPU, call `to_jax` again after the write (it costs
  microseconds) or `torch.cuda.synchronize()`, and let JAX finish reading (`jax.block_until_ready`) before the write.
- JAX may have used the old value already: jit constants, values cached by `np.asarray`, results under way.
- JAX writes to an array's memory only where the array is donated to a jitted function: do not donate a shared one (on a
  CPU, JAX makes a copy instead; on a GPU the result may land in the tensor).

Lifetime. Either object may be dropped first: the buffer lives while the other one does. Dropping the last one on a GPU
gives the buffer back to its own framework at once, though the other may still have work queued that reads it: wait for
that work before you drop the last reference.
"""

from typing import Any

import jax
import jax.numpy as jnp
import torch

_DTYPES: dict[torch.dtype, str] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint8: "uint8",
    torch.uint16: "uint16",
    torch.uint32: "uint32",
    torch.uint64: "uint64",
    torch.bool: "bool",
}

_NARROWED = {torch.float64: torch.float32, torch.int64: torch.int32, torch.uint64: torch.uint32}
"""What JAX holds while x64 is off."""

_ALIGNMENT = {"cpu": 64, "cuda": 16}
"""Bytes that XLA wants a buffer to be aligned to."""


def to_jax(tensor: torch.Tensor, *, copy: bool = False) -> jax.Array:
    """`tensor` as a JAX array on the same device, sharing its memory.

    A tensor that requires a gradient (a parameter) is taken detached.

    Args:
        tensor: a dense tensor on a CPU or a CUDA device, its elements adjacent in memory, in any order of dimensions.
        copy: return an array with memory of its own. A copy may also come from a strided or misaligned tensor, and
            from a 64-bit one while JAX's x64 mode is off, provided that no value changes.

    Raises:
        TypeError: not a plain tensor, or a dtype that JAX lacks.
        ValueError: a layout, alignment or (x64 off) dtype that JAX cannot hold without a copy, or not at all.
        RuntimeError: JAX does not have the tensor's device.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"to_jax: tensor must be a torch.Tensor with memory of its own, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"to_jax: tensor must be dense, got layout {tensor.layout}: call .to_dense() first")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"to_jax: unsupported dtype {tensor.dtype}: expected one of {', '.join(map(str, _DTYPES))}")
    _check_jax_has_device(tensor.device)
    tensor = tensor.detach()
    obstacle = _obstacle(tensor)
    if obstacle and not copy:
        raise ValueError(f"to_jax: cannot share memory: {obstacle}; pass copy=True for a copy")
    if not copy:
        return jax.dlpack.from_dlpack(tensor)
    shareable = _narrow(tensor.resolve_neg()).clone(memory_format=torch.contiguous_format) if obstacle else tensor
    # jax.dlpack.from_dlpack(copy=True) returns the same memory; the wait keeps the source alive until it has been read.
    return jnp.array(jax.dlpack.from_dlpack(shareable), copy=True).block_until_ready()


def to_torch(array: jax.Array, *, copy: bool = False) -> torch.Tensor:
    """`array` as a PyTorch tensor on the same device, sharing its memory.

    PyTorch can write to the tensor; see the module's notes on what that means to JAX.

    Args:
        array: a JAX array on one device.
        copy: return a tensor with memory of its own.

    Raises:
        TypeError: not a JAX array (a tracer has no memory), or a dtype that PyTorch lacks.
        ValueError: the array is spread over several devices or not on a CPU or CUDA device.
        RuntimeError: the array was deleted or donated, or PyTorch does not have its device.
    """
    if isinstance(array, jax.core.Tracer):
        raise TypeError("to_torch: array is a tracer, which has no memory: call to_torch outside jit, grad and vmap")
    if not isinstance(array, jax.Array):
        raise TypeError(f"to_torch: array must be a jax.Array, got {type(array).__name__}")
    if str(array.dtype) not in _DTYPES.values():
        raise TypeError(f"to_torch: unsupported dtype {array.dtype}: expected one of {', '.join(_DTYPES.values())}")
    if array.is_deleted():
        raise RuntimeError("to_torch: the array's memory is gone: it was deleted, or donated to a jitted function")
    if len(array.sharding.device_set) != 1:
        raise ValueError(f"to_torch: array is sharded over {len(array.sharding.device_set)} devices, a tensor has one")
    device: jax.Device = next(iter(array.sharding.device_set))
    if device.platform == "gpu" and not torch.cuda.is_available():
        raise RuntimeError(f"to_torch: array is on {device}, but PyTorch sees no CUDA device")
    if device.platform not in ("cpu", "gpu"):
        raise ValueError(f"to_torch: array is on {device}, expected a CPU or CUDA device")
    shared = torch.from_dlpack(array)
    if not copy:
        return shared
    copied = shared.clone()
    if copied.is_cuda:  # JAX may reuse the source's memory as soon as the caller drops it
        torch.cuda.current_stream(copied.device).synchronize()
    return copied


def tree_to_jax(tree: Any, *, copy: bool = False) -> Any:
    """A tree of tensors (a `state_dict`, nested dicts, lists, tuples) as the same tree of JAX arrays; see `to_jax`.

    The error for a leaf that cannot be shared carries a note that names the leaf.
    """
    return jax.tree.map_with_path(lambda path, leaf: _at(path, to_jax, leaf, copy), tree)


def tree_to_torch(tree: Any, *, copy: bool = False) -> Any:
    """A pytree of JAX arrays as the same tree of tensors; see `to_torch`.

    The error for a leaf that cannot be shared carries a note that names the leaf.
    """
    return jax.tree.map_with_path(lambda path, leaf: _at(path, to_torch, leaf, copy), tree)


def _at(path: Any, convert: Any, leaf: Any, copy: bool) -> Any:
    try:
        return convert(leaf, copy=copy)
    except (TypeError, ValueError, RuntimeError) as error:
        error.add_note(f"at leaf {jax.tree_util.keystr(path)}")
        raise


def _check_jax_has_device(device: torch.device) -> None:
    if device.type not in _ALIGNMENT:
        raise ValueError(f"to_jax: tensor is on {device}, expected a CPU or CUDA device")
    try:
        local = jax.local_devices(backend=device.type)
    except RuntimeError as error:
        raise RuntimeError(f"to_jax: tensor is on {device}, but JAX has no {device.type} backend: {error}") from error
    if device.type == "cuda" and device.index not in [d.local_hardware_id for d in local]:
        raise RuntimeError(f"to_jax: tensor is on {device}, but JAX sees only {local}")


def _obstacle(tensor: torch.Tensor) -> str | None:
    """Why JAX cannot take `tensor` as it is; None if it can."""
    if tensor.dtype in _NARROWED and not jax.config.jax_enable_x64:
        return f"JAX would narrow {tensor.dtype} to {_NARROWED[tensor.dtype]} while its x64 mode is off"
    if tensor.is_neg():
        return "the tensor is a view with the negative bit set"
    if tensor.is_pinned():
        return "the tensor is in page-locked host memory, which DLPack counts as the GPU's"
    if not _is_packed(tensor):
        return f"strides {tensor.stride()} of shape {tuple(tensor.shape)} leave gaps or overlap"
    alignment = _ALIGNMENT[tensor.device.type]
    if tensor.data_ptr() % alignment:
        return f"the data starts {tensor.data_ptr() % alignment} bytes past a multiple of {alignment}, where XLA wants it"
    return None


def _is_packed(tensor: torch.Tensor) -> bool:
    """True if some order of the dimensions makes the tensor contiguous."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the widest dtype that JAX holds at present, if every value survives."""
    if tensor.dtype not in _NARROWED or jax.config.jax_enable_x64:
        return tensor
    narrow = tensor.to(_NARROWED[tensor.dtype])
    if not bool(((narrow.to(tensor.dtype) == tensor) | (tensor != tensor)).all()):
        raise ValueError(
            f"to_jax: values of this {tensor.dtype} tensor do not fit {narrow.dtype}, the widest that JAX holds while its x64 "
            f"mode is off"
        )
    return narrow
