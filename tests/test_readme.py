"""The Python example of README.md runs as it stands. (Its shell commands are run, verbatim, by `.ci/run readme`.)"""

import re
from pathlib import Path

import pytest
from PIL import Image

README = Path(__file__).resolve().parent.parent / "README.md"


def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    pictures = sorted(tmp_path.glob("pair-*.png"))
    assert [p.name for p in pictures] == ["pair-3.png", "pair-4.png"]
    first, second = (Image.open(p).convert("RGB") for p in pictures)
    assert first.size == second.size == (64, 64)
    assert first.tobytes() != second.tobytes()
