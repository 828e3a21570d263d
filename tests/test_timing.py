"""The timer: medians over rounds, interleaved order, a budget, and errors for nothing to measure."""

import time

import pytest
import torch

from stepfuse.benchmarks import harness
from stepfuse.kernels.timing import summarize, time_call, time_calls

CPU = torch.device("cpu")


def test_summary_is_per_call_and_ordered():
    timing = summarize([0.4, 0.2, 0.3, 10.0, 0.1], calls=10, method="host")
    assert timing.median_s == pytest.approx(0.03)
    assert timing.p10_s == pytest.approx(0.01)
    assert timing.p90_s == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no rounds"):
        summarize([], calls=1, method="host")


def test_a_sleep_takes_its_time():
    timing = time_call(lambda: time.sleep(0.005), CPU, rounds=5)
    assert 0.005 <= timing.median_s < 0.02
    assert timing.method == "host"


def test_variants_are_interleaved():
    order: list[str] = []
    time_calls({"a": [lambda: order.append("a")], "b": [lambda: order.append("b")]}, CPU, rounds=4)
    assert "".join(order[2:]) == "abbaabba"  # after one call of each to warm up


def test_the_budget_ends_the_rounds_early():
    timing = time_call(lambda: time.sleep(0.01), CPU, rounds=1000, budget_s=0.05)
    assert 3 <= timing.rounds < 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_and_event_timings_agree_for_a_long_kernel():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    graph = time_call(lambda: a @ a, device, launches=10)
    events = time_call(lambda: a @ a, device, graph=False)
    assert graph.median_s == pytest.approx(events.median_s, rel=0.25)


@pytest.mark.parametrize(("percent", "value"), [(0, 1.0), (50, 2.5), (90, 3.7), (100, 4.0)])
def test_percentiles_interpolate(percent: float, value: float):
    assert harness.percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(value)


def test_a_fingerprint_is_stable_and_names_versions():
    first, second = harness.fingerprint(), harness.fingerprint()
    assert first == second
    assert first["packages"]["torch"] == torch.__version__
    assert len(first["id"]) == 12
