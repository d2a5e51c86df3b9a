"""The GPUs that there are kernels for."""

import jax

from shared_specs.schedule import ARCHITECTURES

(ARCHITECTURE,) = ARCHITECTURES


def check_capability() -> None:
    """Raise on a machine whose GPUs have no kernels. Without a GPU, a computation may still be lowered for another machine."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return
    for device in devices:
        arch = f"sm_{device.compute_capability.replace('.', '')}"
        if arch != ARCHITECTURE:
            raise NotImplementedError(f"bi_jax: {device.device_kind} is {arch}; there are kernels for {ARCHITECTURE} only")
