"""Settings that must stand before a framework is imported.

`python -m pytest` runs what any machine can run, on the CPU even where there is a GPU; `python -m pytest -m gpu` the rest.
"""

import os
import shutil
import subprocess

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


def pytest_sessionstart(session: pytest.Session) -> None:
    if not _wants_gpu(session.config):
        return
    smi = shutil.which("nvidia-smi")
    if smi is None or subprocess.run([smi, "-L"], capture_output=True, check=False).returncode:
        pytest.exit("-m gpu: nvidia-smi shows no GPU", returncode=pytest.ExitCode.USAGE_ERROR)
