"""Writes the trained model as a Stable Diffusion 1.x type diffusers folder in float16, with our default settings."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from .autoencoder import build_autoencoder
from .denoiser import CONFIG as UNET_CONFIG
from .diffusion import SCHEDULER
from .scenes import SIZE
from .text_encoder import build_text_encoder
from .tokenizer import build_tokenizer

SHIPPED = Path(__file__).resolve().parents[2] / "engine" / "builtin" / "shapes"
DEFAULTS = {"steps": 20, "guidance_scale": 3.0, "width": SIZE, "height": SIZE}
FILE_LIMIT = 15 * 2**20
FOLDER_LIMIT = 18 * 2**20


def package(work: Path, target: Path) -> int:
    """Assemble `target` from the parts in `work` (parts not trained yet get random weights); returns bytes written.

    The folder is complete before it takes the place of the old one. RuntimeError where it outgrows its limits.
    """
    tokenizer = build_tokenizer(work / "tokenizer")
    torch.manual_seed(0)
    parts = {
        "vae": _load(AutoencoderKL, work / "vae") or build_autoencoder(),
        "unet": _load(UNet2DConditionModel, work / "unet") or UNet2DConditionModel(**UNET_CONFIG),
        "text_encoder": _load(CLIPTextModel, work / "text_encoder") or build_text_encoder(tokenizer),
    }
    pipeline = StableDiffusionPipeline(
        **{name: part.half() for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    fresh = target.with_name(target.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh)
    shutil.rmtree(fresh / "tokenizer")
    build_tokenizer(fresh / "tokenizer")
    (fresh / "stepfuse.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    return ship(fresh, target, FOLDER_LIMIT)


def ship(fresh: Path, target: Path, limit: int) -> int:
    """Put a complete folder in the place of `target`; returns its bytes. RuntimeError where it outgrows its limits."""
    for path in fresh.rglob("*.json"):
        forget_origin(path)
    for path in fresh.rglob("*.safetensors"):
        path.chmod(0o644)
    sizes = {path: path.stat().st_size for path in fresh.rglob("*") if path.is_file()}
    if max(sizes.values()) > FILE_LIMIT or sum(sizes.values()) > limit:
        raise RuntimeError(f"got {sum(sizes.values())} bytes, the largest file {max(sizes.values())}; shrink the model")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    return sum(sizes.values())


def _load(kind: type, folder: Path) -> torch.nn.Module | None:
    return kind.from_pretrained(folder) if folder.exists() else None


def forget_origin(path: Path) -> None:
    """Drop the path the part was loaded from, which diffusers and transformers write into the configs."""
    values = json.loads(path.read_text())
    if isinstance(values, dict) and ("_name_or_path" in values or "name_or_path" in values):
        values.pop("_name_or_path", None)
        values.pop("name_or_path", None)
        path.write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/stepfuse/shapes")
    parser.add_argument("--target", type=Path, default=SHIPPED)
    args = parser.parse_args()
    print(f"{args.target}: {package(args.work, args.target) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
