"""Cascades: what runs after what, and what a stage makes of the stage before. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .errors import RequestError, closest
from .request import Request

Resize = Literal["lanczos", "bicubic", "bilinear", "nearest"]
FILTERS: tuple[Resize, ...] = ("lanczos", "bicubic", "bilinear", "nearest")
INPUTS = ("image", "latents")
OWN_FIELDS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "steps", "guidance_scale",
              "guidance_rescale", "dynamic_threshold", "sampler", "schedule", "eta", "s_churn", "s_tmin", "s_tmax",
              "s_noise", "clip_skip", "strength", "noise_level", "blur", "denoising_start", "denoising_end", "width",
              "height", "upscale", "loras")  # fmt: skip
"""Fields of Request that a stage may set for itself."""


def _one_of(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise RequestError(f"stage: {name}: got {value!r}, {closest(str(value), valid)}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One model's part of a cascade.

    model: a model of the engine (None: the request's), or one of FILTERS, which only resample. request:
    values of OWN_FIELDS, over what the request says.

    Of a stage after the first: input: what it takes of the stage before, its "image" or its "latents". scale: its size
    relative to that; None: what the model enlarges by, else 1. resize: how image or latents come to the size of this
    stage, where the model does not enlarge them itself. Latents are gone on with as they are where the stage has a
    denoising_start, and noised by its strength otherwise. tile: side in pixels of the tiles in which larger results are
    made, every tile a row of its own; None: in one piece. overlap: of neighbouring tiles, in pixels; None: a quarter.
    Raises RequestError for what contradicts itself.
    """

    model: str | None = None
    input: Literal["image", "latents"] = "image"
    scale: float | None = None
    resize: Resize = "lanczos"
    tile: int | None = None
    overlap: int | None = None
    request: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("input", self.input, INPUTS)
        _one_of("resize", self.resize, FILTERS)
        for name in self.request:
            if name not in OWN_FIELDS:
                raise RequestError(f"stage: a stage cannot set {name!r}: {closest(str(name), OWN_FIELDS)}")
        for name in ("width", "height"):
            side = self.request.get(name)
            if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 1):
                raise RequestError(f"stage: {name}: got {side!r}, expected a whole number >= 1")
        if self.scale is not None and not (isinstance(self.scale, (int, float)) and 0 < self.scale <= 16):
            raise RequestError(f"stage: scale: got {self.scale!r}, expected a number above 0, up to 16")
        if self.tile is not None and (not isinstance(self.tile, int) or self.tile < 2):
            raise RequestError(f"stage: tile: got {self.tile!r}, expected pixels, or leave it out")
        if self.overlap is not None and (self.tile is None or not 0 < self.overlap <= self.tile // 2):
            raise RequestError(f"stage: overlap: got {self.overlap!r} with tile {self.tile!r}, expected 1 to tile / 2")
        if self.plain and (self.request or self.tile is not None or self.input != "image"):
            raise RequestError(f"stage: {self.model} only resamples an image; it takes a scale and nothing else")
        if self.input == "latents" and self.resize == "lanczos" and self.scale not in (None, 1):
            raise RequestError("stage: resize: latents are resized by 'bicubic', 'bilinear' or 'nearest'; choose one")

    @property
    def plain(self) -> bool:
        """Whether it only resamples."""
        return self.model in FILTERS

    @classmethod
    def from_mapping(cls, entry: Mapping[str, Any]) -> Stage:
        """From plain values: fields of Stage, and beside them those of OWN_FIELDS."""
        own = [f.name for f in fields(cls) if f.name != "request"]
        for name in entry:
            if name not in own and name not in OWN_FIELDS:
                raise RequestError(f"stage: unknown entry {name!r}: {closest(str(name), (*own, *OWN_FIELDS))}")
        values = {name: entry[name] for name in own if name in entry}
        return cls(**values, request={name: entry[name] for name in OWN_FIELDS if name in entry})


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Stages that run one after the other. models: name -> source of models that they need; an engine that lacks one
    loads it. Raises RequestError where there are no two stages, or a first one that could not run.
    """

    name: str
    stages: tuple[Stage, ...]
    models: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.stages) < 2:
            raise RequestError(f"cascade {self.name!r}: got {len(self.stages)} stages, expected at least two")
        first = self.stages[0]
        if first.plain or first.scale is not None or first.tile is not None:
            raise RequestError(
                f"cascade {self.name!r}: the first stage has no stage before it: no scale, tile or filter"
            )
        for stage, before in zip(self.stages[1:], self.stages, strict=False):
            if stage.input == "latents" and before.plain:
                raise RequestError(f"cascade {self.name!r}: {before.model} leaves an image, no latents")

    @classmethod
    def of(cls, wanted: str | Path | Cascade) -> Cascade:
        """A cascade, the name of a built-in one, or a file with one. Raises RequestError for anything else."""
        if isinstance(wanted, Cascade):
            return wanted
        if str(wanted) in BUILTIN:
            return BUILTIN[str(wanted)]
        if Path(wanted).suffix.lower() in (".yaml", ".yml", ".json"):
            return cls.from_file(wanted)
        raise RequestError(
            f"cascade: got {str(wanted)!r}, expected a .yaml file or a name; {closest(str(wanted), BUILTIN)}"
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Cascade:
        """Read a YAML (or JSON) file: `stages`, a list of mappings as of `Stage.from_mapping`; `models`; `name`.

        A source that begins with a dot is relative to the file. Raises RequestError for a file that is no such thing.
        """
        import yaml

        path = Path(path)
        if not path.is_file():
            raise RequestError(f"cascade: no file {str(path)!r}")
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise RequestError(f"cascade: {path} is no YAML: {error}") from None
        stages = found.get("stages") if isinstance(found, dict) else None
        if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
            raise RequestError(f"cascade: {path} has no list `stages` of mappings (docs/cascades.md)")
        for name in found:
            if name not in ("name", "models", "stages"):
                raise RequestError(f"cascade: {path}: unknown entry {name!r}: valid: models, name, stages")
        models = found.get("models") or {}
        if not isinstance(models, dict) or not all(isinstance(v, str) for v in (*models, *models.values())):
            raise RequestError(f"cascade: {path}: models: expected name: source")
        places = {name: str(path.parent / to) if to.startswith(".") else to for name, to in models.items()}
        return cls(name=str(found.get("name", path.stem)), stages=tuple(map(Stage.from_mapping, stages)), models=places)

    def fields_of(self, index: int, request: Request) -> dict[str, Any]:
        """What a stage takes of the request, before its image or latents: fields of Request.

        All stages take the texts. How to sample is for the first stage, those of the same model, and those that go on
        from latents; another model has its own defaults.
        """
        stage = self.stages[index]
        model, first = (one.model or request.model for one in (stage, self.stages[0]))
        names = SHARED if index else tuple(f.name for f in fields(Request))
        if index and (model == first or stage.input == "latents"):
            names = (*names, *SAMPLING)
        taken = {name: getattr(request, name) for name in names}
        if index and model == first:
            taken |= {name: getattr(request, name) for name in (*EMBEDDINGS, "loras")}
        taken["upscale"] = request.upscale if index == len(self.stages) - 1 else None
        return taken | dict(stage.request) | {"model": model}


SHARED = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "n", "class_labels", "output", "metadata",
          "deadline", "client")  # fmt: skip
SAMPLING = ("steps", "guidance_scale", "guidance_rescale", "dynamic_threshold", "sampler", "schedule", "eta", "s_churn",
            "s_tmin", "s_tmax", "s_noise", "clip_skip", "sigmas")  # fmt: skip
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

BUILTIN = {
    "hires-fix": Cascade(name="hires-fix", stages=(Stage(), Stage(scale=2, request={"strength": 0.5}))),
    "shapes-x4": Cascade(
        name="shapes-x4", stages=(Stage(), Stage(model="shapes-x4", scale=4)), models={"shapes-x4": "shapes-x4"}
    ),
}
"""hires-fix: the image enlarged and redrawn by the same model. shapes-x4: the built-in upscaler behind `shapes`."""
