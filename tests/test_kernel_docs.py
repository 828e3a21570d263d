"""The code blocks of docs/kernels/README.md run as they stand, and its table names every op."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from stepfuse import kernels
from stepfuse.kernels import workloads

TEXT = (Path(__file__).parents[1] / "docs" / "kernels" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
EXPECTED = (
    "Returns [B, C, ...] in x's dtype and memory format",
    "attention: vendor:cudnn cannot run this call: it needs a CUDA device, the tensors are on cpu",
    "geglu              reference           1 sites",
    "",
)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs(
    index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(BLOCKS[index], encoding="utf-8")
    runpy.run_path("block.py")
    assert EXPECTED[index] in capsys.readouterr().out
    if "mine.json" in BLOCKS[index]:
        (workload,) = workloads.read(tmp_path / "mine.json")["layer_norm"]
        assert workload.name == "mine: x[2,77,768] weight=None bias=None"


def test_every_op_and_block_is_there() -> None:
    assert len(BLOCKS) == len(EXPECTED)
    table = TEXT[: TEXT.index("## Calling")]
    assert set(re.findall(r"`(\w+)`", table)) == set(kernels.__all__)
