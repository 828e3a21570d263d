"""`stepfuse upscale`: a picture enlarged without diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..engine.errors import RequestError
from . import options
from .arguments import check_output
from .terminal import err, progress


def upscale(
    image: Annotated[Path, typer.Argument(help="Picture to enlarge.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")] = Path("upscaled.png"),
    model: Annotated[
        str, typer.Option("--model", "-m", help="lanczos, or a .safetensors file of Real-ESRGAN, SwinIR, ...")
    ] = "lanczos",
    scale: Annotated[float | None, typer.Option(help="Factor. Default: the network's own.")] = None,
    tile: Annotated[int, typer.Option(help="Side of the tiles a network sees, in pixels of the picture.")] = 512,
    overlap: Annotated[int, typer.Option(help="Pixels that neighbouring tiles share.")] = 32,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Enlarge a picture, without diffusion."""
    from ..engine.conditioning.images import load_image
    from ..engine.images import save_png

    check_output(output)
    if scale is not None and not 0.01 <= scale <= 16:
        raise RequestError(f"--scale: got {scale:g}, expected a number from 0.01 to 16")
    if scale is None and model == "lanczos":
        raise RequestError("--scale: lanczos takes any factor; say which, such as --scale 2")
    pixels = load_image(image)
    import torch

    from ..engine.config import resolve_device, resolve_dtype
    from ..engine.upscaling.registry import LANCZOS, Upscalers

    place, factor = resolve_device(device), "" if scale is None else f":{scale:.6f}"
    upscalers, name = Upscalers(place), LANCZOS if model == LANCZOS else Path(model).stem.replace(":", " ")
    with progress() as bar, torch.no_grad():
        task = bar.add_task("upscaling", total=None)
        if model != LANCZOS:
            upscalers.add(
                name, model, dtype=resolve_dtype("dtype", dtype), tile=tile, overlap=overlap,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
        found = upscalers.find(f"{name}{factor}", pixels.shape[1], pixels.shape[0])
        assert found is not None
        made = found(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(place))
    save_png(made[0].permute(1, 2, 0).cpu().numpy(), output, None)
    err.print(f"{output}  ({made.shape[-1]} x {made.shape[-2]} pixels)")
