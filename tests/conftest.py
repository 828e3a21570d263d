"""Shared fixtures: reference models are built by diffusers once per test run, lazily, into a temporary folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # for `reference`, in pytest's importlib mode


@pytest.fixture(scope="session")
def reference_network(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[nn.Module, Path]]:
    """name ("unet/sd15", "vae/f8") -> the diffusers module in float64 and the folder it was saved to in float32."""
    from reference.networks import build_network

    built: dict[str, tuple[nn.Module, Path]] = {}

    def get(name: str) -> tuple[nn.Module, Path]:
        if name not in built:
            folder = tmp_path_factory.mktemp(name.replace("/", "-"))
            built[name] = (build_network(name, folder), folder)
        return built[name]

    return get


@pytest.fixture(scope="session")
def exported_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as an ONNX artefact, made once for all test processes: copy it to change it."""
    from filelock import FileLock
    from reference.exports import invoke

    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "exported-shapes"
    with FileLock(shared.with_suffix(".lock")):
        if not (shared / "done").exists():
            arguments = ["shapes", "-o", str(shared / "artefact"), "--shapes", "64x64,96x64", "--rows", "1,4"]
            assert invoke("onnx", *arguments, "--no-verify") == 0
            (shared / "done").touch()
    return shared / "artefact"


@pytest.fixture(scope="session")
def reference_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name ("sd15", "sd2_v", "sdxl") -> the folder of a complete pipeline in float32."""
    from reference.pipelines import build_pipeline

    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = tmp_path_factory.mktemp(name)
            build_pipeline(name, built[name])
        return built[name]

    return get
