"""Settings that must stand before a framework is imported.

`python -m pytest` runs what any machine can run, on the CPU even where there is a GPU; `python -m pytest -m gpu` the rest.
"""

import gc
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest


def _wants_gpu(config: pytest.Config) -> bool:
    words = config.getoption("markexpr").replace("(", " ").replace(")", " ").split()
    return "gpu" in words and words[words.index("gpu") - 1] != "not"


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not _wants_gpu(config):
        os.environ.update(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
        os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # devices to shard over
        gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: the garbage collector looks at the tests' own objects alone, and less often."""
    if not _wants_gpu(session.config):  # where cycles may hold a GPU's memory
        gc.freeze()
        gc.set_threshold(100_000, 10, 10)
        gc.enable()


def pytest_sessionstart(session: pytest.Session) -> None:
    if not _wants_gpu(session.config):
        return
    smi = shutil.which("nvidia-smi")
    if smi is None or subprocess.run([smi, "-L"], capture_output=True, check=False).returncode:
        pytest.exit("-m gpu: nvidia-smi shows no GPU", returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture(scope="session")
def inductor() -> Iterator[None]:
    """torch.compile without what costs a minute at its start: worker processes, and trials of every vector extension."""
    import torch
    import torch._dynamo
    import torch._functorch.config
    from torch._inductor import config, cpu_vec_isa

    extensions = [cpu_vec_isa.VecAVX2()] if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else []
    settings = {"compile_threads": 8 if torch.cuda.is_available() else 1, "fx_graph_cache": False, "cpp.vec_isa_ok": True}
    with (
        pytest.MonkeyPatch.context() as context,
        config.patch(settings),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        if extensions:
            context.setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: extensions)
        yield
    torch._dynamo.reset()
