"""The code blocks of docs/embedding.md run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "docs" / "embedding.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", TEXT, re.DOTALL)


def test_every_section_with_code_is_found() -> None:
    assert len(BLOCKS) == TEXT.count("```python") == 7


@pytest.mark.parametrize(("title", "code"), [b for b in BLOCKS if "FastAPI" not in b[0]], ids=lambda v: v[:20])
def test_block_runs(title: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    runpy.run_path("block.py")
    assert all(path.stat().st_size > 100 for path in tmp_path.glob("*.png"))


def test_fastapi_block_serves_a_picture_and_refuses_nonsense(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    (code,) = (code for title, code in BLOCKS if "FastAPI" in title)
    (tmp_path / "server.py").write_text(code, encoding="utf-8")
    app = runpy.run_path(str(tmp_path / "server.py"))["app"]
    with TestClient(app) as client:
        answer = client.get("/image", params={"prompt": "a red circle", "seed": 1})
        assert answer.status_code == 200
        assert answer.content.startswith(b"\x89PNG")
        assert client.get("/image", params={"prompt": "a red circle", "seed": -1}).status_code == 422
