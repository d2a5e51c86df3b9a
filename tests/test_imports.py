"""Each package imports with its own framework alone, proven in a process that refuses every other one."""

import subprocess
import sys

import pytest

BLOCKER = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"refused import of {{name}}", name=name)

sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
    importlib.import_module(module)
"""

TORCH = ("torch", "triton")
JAX = ("jax", "jaxlib", "ml_dtypes", "scipy")
TERMINAL = ("rich", "matplotlib")


def import_refusing(refused: tuple[str, ...], *modules: str) -> subprocess.CompletedProcess[str]:
    program = BLOCKER.format(refused=refused, modules=modules)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(
    ("modules", "refused"),
    [
        (
            ("shared_specs", "shared_specs.reference", "shared_specs.inputs", "shared_specs.verification"),
            TORCH + JAX + TERMINAL,
        ),
        (("bi_torch", "bi_torch.verify"), (*JAX, "bi_jax", "bi_bridge")),
        (("bi_jax", "bi_jax.verify"), (*TORCH, "bi_torch", "bi_bridge")),
    ],
    ids=lambda value: value[0],
)
def test_imports_alone(modules: tuple[str, ...], refused: tuple[str, ...]) -> None:
    done = import_refusing(refused, *modules)
    assert done.returncode == 0, done.stderr


def test_shared_specs_needs_nothing_but_numpy() -> None:
    program = (
        "import sys, numpy; before = set(sys.modules); import shared_specs, shared_specs.reference, shared_specs.verification\n"
    )
    program += (
        "new = {m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)\nprint(sorted(new))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "['shared_specs']"


def test_the_blocker_blocks() -> None:
    assert "refused import of torch" in import_refusing(TORCH, "bi_torch").stderr
