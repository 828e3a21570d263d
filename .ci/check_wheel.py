"""Run with a python that has only the wheel: python -P check_wheel.py CHECKOUT WHEEL

The wheel holds what pyproject.toml lists and nothing else, is imported from its own place, and draws a picture.
"""

import sys
import zipfile
from pathlib import Path

import stepfuse

checkout, wheel = Path(sys.argv[1]).resolve(), Path(sys.argv[2])

place = Path(stepfuse.__file__).resolve().parent
assert not place.is_relative_to(checkout), f"stepfuse was imported from the checkout: {place}"

names = zipfile.ZipFile(wheel).namelist()
strays = [n for n in names if n.split("/")[1] in {"tests", "docs", "examples", "build", "pyproject.toml"}]
assert not strays, f"files that do not belong in the wheel: {strays[:5]}"
assert "stepfuse/py.typed" in names
assert any(n.startswith("stepfuse/engine/builtin/") and n.endswith(".safetensors") for n in names), "no built-in model"
print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 2**20:.1f} MB")

with stepfuse.Engine.load("shapes", device="cpu") as engine:
    result = engine.generate("a red circle above a blue square", seed=7)
image = result.images[0]
low, high = image.convert("L").getextrema()
assert high - low > 20, f"a flat picture: grey levels {low} to {high}"
print(f"generated {image.size} with {result.model}, seeds {result.seeds}")
