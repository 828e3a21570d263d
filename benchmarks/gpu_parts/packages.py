"""One guided update as the engine makes it, by an AOT package and by our own graphs on the same weights, side by side.

The package is compiled here, of the denoiser alone; compiling and opening are timed once. Its updates are timed
interleaved with ours, eager and captured, and a second instance of the eager one (A/A). The error is that of the change
an update makes to the latents, against the eager update in float32.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file

from ...engine.components import Components, short
from ...engine.config import EngineConfig
from ...engine.families import builtin_folder
from ...engine.loading import load_components
from ...engine.runner import Runner
from ...engine.runtimes.exported import FixedKernels
from ...engine.runtimes.opened import Opened
from ...export.aoti import export_aoti
from ...export.folder import Options, open_source
from ...export.spec import make_spec
from ...kernels.timing import time_calls
from ..architectures import architecture
from ..kernel_measurement import claim, spread
from .batches import Updates, configured, filled, model
from .runners import REQUEST
from .session import Session, relative_error

PACKAGE, EAGER, AGAIN, GRAPH = "package", "eager", "eager again", "graph"
ROWS = 2  # of the network: both guidance branches of one image


def run(session: Session) -> None:
    for case in ("tiny",) if session.tiny else ("shapes", "sd15"):
        if not session.measure(f"{case} n=1 package beside torch", lambda c=case: measure(session, c)):
            return


def measure(session: Session, case: str) -> dict[str, Any]:
    """Compile, open, compare and time. Raises ValueError for updates that are not finite."""
    exact = _updates(_parts(session, case, dtype="float32", kernels="reference"), "eager")
    exact()
    truth = exact.moved()
    parts = _parts(session, case)
    with TemporaryDirectory(prefix="stepfuse-packages-") as folder:
        packaged, facts = _packaged(parts, case, Path(folder))
        calls = {EAGER: _updates(parts, "eager"), AGAIN: _updates(parts, "eager"), PACKAGE: _updates(packaged, "eager")}
        if session.cuda:
            calls[GRAPH] = _updates(parts, "graph")
        errors = {}
        for name, updates in calls.items():
            updates()
            moved = updates.moved()
            if not bool(moved.isfinite().all()):
                raise ValueError(f"the update is not finite: {name}")
            errors[name] = relative_error(moved, truth)
        rounds = 3 if session.tiny else 30
        each = {name: [updates] for name, updates in calls.items()}
        timings = time_calls(each, session.device, rounds=rounds, graph=False, budget_s=15.0)
    apart = spread(timings[EAGER], timings[AGAIN])
    green = errors[PACKAGE] <= 2 * errors[EAGER] + 1e-7
    own = timings[PACKAGE].median_s
    rivals = [name for name in (EAGER, GRAPH) if name in timings]
    return {
        "ms": 1e3 * own,
        "error_vs_float32": errors[PACKAGE],
        "gate": green,
        "speedup": {name: claim(timings[name].median_s, own, apart) if green else None for name in rivals},
        "a_a_spread": apart,
        "variants": {name: {"error": errors[name], **timing.record()} for name, timing in timings.items()},
        **facts,
    }


def _parts(session: Session, case: str, **options: Any) -> Components:
    given = {"max_rows": 1, "runner": "eager", **options}
    if case == "shapes":
        return load_components(case, EngineConfig(**{"device": str(session.device), "dtype": session.dtype} | given))
    return model(session, case, **given)


def _updates(parts: Components, mode: str) -> Updates:
    parts = configured(parts, runner=mode)
    runner = Runner(parts)
    return Updates(runner, filled(parts, runner, [REQUEST]))


def _packaged(parts: Components, case: str, folder: Path) -> tuple[Components, dict[str, Any]]:
    """The same components with their denoiser compiled, and what that took."""
    config, device = parts.config, parts.config.device
    source = builtin_folder(case) if case == "shapes" else _saved(parts, case, folder / "unet")
    height, width = _sites(parts)
    options = Options(components=("unet",), rows=(ROWS,), dtype=short(config.dtype))
    scale = make_spec(open_source(source, options), "unet").scale
    options = replace(options, shapes=((width * scale, height * scale),))
    start = time.perf_counter()
    export_aoti(source, folder / "aoti", options, device=device.type, fixed_rows=True)
    compiled = time.perf_counter()
    denoiser = Opened(folder / "aoti", "aoti").denoiser(device)
    facts = {
        "compile_s": compiled - start,
        "open_s": time.perf_counter() - compiled,
        "package_mb": sum(file.stat().st_size for file in (folder / "aoti").rglob("*.pt2")) / 2**20,
        "kernels": denoiser.session.graph.options["kernels"],
    }
    binders = {**parts.binders, "unet": FixedKernels("an AOT package")}
    return replace(parts, denoiser=denoiser, binders=binders, config=replace(config, runtime="aoti")), facts


def _sites(parts: Components) -> tuple[int, int]:
    """Height and width of the latents of the request that is timed."""
    x = filled(parts, Runner(parts), [REQUEST]).state.x
    return x.shape[-2], x.shape[-1]


def _saved(parts: Components, case: str, folder: Path) -> Path:
    """The denoiser as a checkpoint of that part alone; our names are diffusers'."""
    folder.mkdir()
    config = {"_class_name": "UNet2DConditionModel", **architecture(case).unet}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = {name: tensor.cpu().contiguous() for name, tensor in parts.unet.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder
