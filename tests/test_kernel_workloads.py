"""The calls that tuning times are those of the graphs.

`python tests/test_kernel_workloads.py` (with the package on the import path) writes kernels/workloads.json anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from stepfuse.benchmarks import kernel_shapes
from stepfuse.benchmarks.gpu_parts import unets
from stepfuse.benchmarks.kernel_shapes import Input, Shape
from stepfuse.kernels import geglu, workloads
from stepfuse.kernels.dispatch import Site
from stepfuse.kernels.workloads import FILE, Tensor, Workload

SD2 = unets.SD15 | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}


def of_the_graphs() -> list[Workload]:
    """Every op call of the models, and the sampler's ops for a batch of eight images, all in bfloat16."""
    kernel_shapes.UNETS.setdefault("sd2", SD2)
    made = [_workload(s, s.model) for model in (*kernel_shapes.UNETS, *kernel_shapes.DECODERS) for s in _shapes(model)]
    wide = (s for s in _shapes("sdxl", 16) if s.op in ("sampler_step", "guidance_stats"))
    made += [_workload(s, "sdxl-8-images") for s in wide]
    return sorted(workloads.merged(made), key=lambda w: w.op)


def _shapes(model: str, rows: int = 2) -> list[Shape]:
    return kernel_shapes.shapes(model, rows)


def _workload(shape: Shape, model: str) -> Workload:
    arguments = {
        name: Tensor(v.shape, v.stride, v.dtype or torch.bfloat16) if isinstance(v, Input) else v
        for name, v in shape.arguments
    }
    return Workload(shape.op, arguments, {model: shape.count})


def in_the_file() -> Iterator[Workload]:
    return (w for of_op in workloads.read().values() for w in of_op)


@pytest.mark.slow
def test_the_committed_workloads_are_those_of_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_shapes, "UNETS", dict(kernel_shapes.UNETS))
    graphs, file = ({w.op + " " + w.name: w for w in some} for some in (of_the_graphs(), in_the_file()))
    assert sorted(graphs) == sorted(file), f"python {Path(__file__).name} writes {FILE.name} anew"
    assert graphs == file
    assert {"sd15", "sd2", "sdxl", "sd15-vae", "sdxl-vae"} <= {model for w in file.values() for model in w.calls}


def test_names_are_unique() -> None:
    names = [(w.op, w.name) for w in in_the_file()]
    assert len(names) == len(set(names)) > 100


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Site(geglu), Site(geglu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.cat([self.first(x), self.first(x)], -1))


def test_any_network_can_be_recorded_written_and_read_back(tmp_path: Path) -> None:
    net = Gated()
    found = workloads.record(net, lambda: net(torch.zeros(3, 8, dtype=torch.float16).T.contiguous().T), "mine")
    apart, plain = (Tensor((3, 8), stride, torch.float16) for stride in ((1, 3), (8, 1)))
    assert found == [
        Workload("geglu", {"x": apart}, {"mine": 2}),
        Workload("geglu", {"x": plain}, {"mine": 1}),
    ]
    assert not net.first.fused, "recording has ended"
    workloads.write(tmp_path / "mine.json", found)
    assert workloads.read(tmp_path / "mine.json") == {"geglu": found}
    x = found[0].tensors(torch.device("cpu"))["x"]
    assert (x.shape, x.stride(), x.dtype) == ((3, 8), (1, 3), torch.float16)


def test_a_file_without_workloads_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[1]", '[{"op": "geglu"}]'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=r"x\.json has no workloads"):
            workloads.read(tmp_path / "x.json")
    with pytest.raises(ValueError, match="has no workloads"):
        workloads.read(tmp_path / "missing.json")


if __name__ == "__main__":
    workloads.write(FILE, of_the_graphs())
