"""Paints the gallery and writes docs/gallery.md, docs/gallery.json and docs/images/gallery/<feature>.png.

    python -m stepfuse.examples.gallery [FEATURE ...] [--prompts N] [--docs DIR]

Without features all are made; with some, the others of the report stay as they are. Everything goes through `Engine`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from stepfuse import Engine
from stepfuse.engine.errors import StepfuseError

from . import adapting, controlling, editing, enlarging, prompting
from .exhibit import Maker
from .report import report

DOCS = Path(__file__).resolve().parents[2] / "docs"
FEATURES: dict[str, Maker] = {
    "text_to_image": prompting.text_to_image,
    "guidance": prompting.guidance,
    "negative_prompt": prompting.negative_prompt,
    "prompt_weighting": prompting.prompt_weighting,
    "image_to_image": editing.image_to_image,
    "inpainting": editing.inpainting,
    "inpainting_model": editing.inpainting_model,
    "repaint": editing.repaint,
    "change_map": editing.change_map,
    "outpainting": editing.outpainting,
    "controlnet": controlling.controlnet,
    "lora": adapting.lora,
    "textual_inversion": adapting.textual_inversion,
    "plain_upscaling": enlarging.plain_upscaling,
    "hires_fix": enlarging.hires_fix,
    "shapes_x4": enlarging.shapes_x4,
}


def make(names: Sequence[str], docs: Path = DOCS, prompts: int | None = None) -> dict[str, dict]:
    """Paint these features and write strips and report; returns all entries of the report, by feature.

    prompts: of every feature; None: each has its own number. A feature whose model is not there is left out of the
    report, with a message.
    """
    made: dict[str, dict] = {}
    skipped: list[str] = []
    with Engine.load("shapes", device="cpu", controlnets=controlling.CONTROLNETS) as engine:
        for name in names:
            if name == "shapes_x4" and not _there(engine):
                skipped.append(name)
                continue
            made[name] = FEATURES[name](engine, prompts).save(docs / "images" / "gallery" / f"{name}.png")
            for score in made[name]["scores"]:
                print(f"{name}: {score['at']} {score['what']}: {score['count']} of {score['of']}", flush=True)
    record = docs / "gallery.json"
    before = json.loads(record.read_text()) if record.exists() else {}
    entries = {name: (before | made)[name] for name in FEATURES if name in before | made and name not in skipped}
    record.write_text(json.dumps(entries, indent=1) + "\n")
    (docs / "gallery.md").write_text(report(entries))
    return entries


def _there(engine: Engine) -> bool:
    """Whether the upscaler can be loaded; it is then in the engine."""
    try:
        engine.add("shapes-x4", "shapes-x4")
    except StepfuseError as error:
        print(f"shapes_x4 skipped: {error}")
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("features", nargs="*", metavar="FEATURE", help=f"default: all of {', '.join(FEATURES)}")
    parser.add_argument("--prompts", type=int, help="prompts of every feature; default: its own number")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where report and pictures go")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.features if name not in FEATURES]
    if unknown:
        parser.error(f"got {unknown[0]!r}, expected some of {', '.join(FEATURES)}")
    make(arguments.features or list(FEATURES), arguments.docs, arguments.prompts)


if __name__ == "__main__":
    main()
