"""What importing stepfuse costs and what it must not break. Each case is a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["torch", "triton", "numpy", "transformers", "diffusers", "fastapi", "ray", "PIL"]
TORCH_FREE = [
    "stepfuse",
    "stepfuse.cli",
    "stepfuse.benchmarks.cli",
    "stepfuse.export.cli",
    "stepfuse.engine.artifact",
    "stepfuse.engine.errors",
    "stepfuse.engine.request",
    "stepfuse.engine.scheduler",
    "stepfuse.engine.sampling.schedules",
    "stepfuse.engine.weights.detect",
    "stepfuse.engine.weights.keymap",
]


def python(code: str, *, cwd: Path = ROOT, safe_path: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds `stepfuse` the way this one does."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    if safe_path:
        environment["PYTHONSAFEPATH"] = "1"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def modules_after(statement: str) -> set[str]:
    done = python(f"{statement}\nimport sys, json\nprint('MODULES', json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rpartition("MODULES")[2]))


@pytest.mark.parametrize("module", TORCH_FREE)
def test_import_is_light(module: str):
    loaded = modules_after(f"import {module}")
    assert module in loaded
    heavy = [name for name in HEAVY if name in loaded and not (name == "numpy" and "sampling" in module)]
    assert heavy == []


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["bench", "--help"]])
def test_help_is_light(arguments: list[str]):
    loaded = modules_after(
        f"import sys\nsys.argv = ['stepfuse', *{arguments!r}]\nfrom stepfuse.cli import main\n"
        "try:\n    code = main()\nexcept SystemExit as stop:\n    code = stop.code\nassert not code, code"
    )
    assert [name for name in HEAVY if name in loaded] == []


@pytest.mark.slow
def test_every_exported_name_resolves():
    code = "import stepfuse\nfor name in stepfuse.__all__: assert getattr(stepfuse, name) is not None, name"
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    done = python("import stepfuse\nstepfuse.Enginee")
    assert "AttributeError: module 'stepfuse' has no attribute 'Enginee'" in done.stderr


def test_the_version_is_written_once():
    done = python("import stepfuse; print(stepfuse.__version__)")
    assert done.stdout.strip().count(".") == 2
    assert done.stdout.strip() not in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_transformers_imports_from_a_checkout_without_safe_path():
    """transformers probes for a top-level package `kernels`; from the checkout it finds ours, which must do no harm."""
    code = (
        "import sys; assert sys.path[0] == '', sys.path\n"
        "from transformers import CLIPTextModel, CLIPTokenizer\n"
        "import kernels; print(kernels.__file__)"
    )
    done = python(code, safe_path=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == ROOT / "kernels"


def test_the_op_registry_refuses_another_name():
    """A second copy of the registry would silently replace the operators of the first."""
    done = python("import kernels.op", safe_path=False)
    assert done.returncode != 0
    assert "ImportError: the op registry must be imported as stepfuse.kernels.op" in done.stderr


def test_kernels_import_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from stepfuse import kernels\n"
        "import stepfuse.kernels.op, torch\n"
        "for name in kernels.__all__: assert callable(getattr(kernels, name)), name\n"
        "x, w = torch.ones(1, 4, 2, 2), torch.ones(4)\n"
        "y = kernels.group_norm_silu(x, w, w, 2, 1e-5)\n"
        "print(float((y - torch.nn.functional.silu(w[0])).abs().max()))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6
