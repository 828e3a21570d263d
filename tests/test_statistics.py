"""Partial statistics of images, and the choice of a launch configuration for a group norm."""

from __future__ import annotations

import pytest
import torch

from stepfuse.kernels.statistics import check, group_moments, partial_statistics, run_count, sites_per_run


def test_runs_of_sites() -> None:
    assert [sites_per_run(s) for s in (1, 64, 4096, 4097, 16384, 1 << 20)] == [64, 64, 64, 128, 128, 1024]
    assert [run_count(s) for s in (1, 64, 65, 4096, 1 << 20)] == [1, 1, 2, 64, 1024]


@pytest.mark.parametrize("sites", [(1,), (5, 7), (11, 13), (16, 32)])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_group_moments_of_partial_statistics_are_those_of_the_image(sites: tuple[int, ...], mean: float) -> None:
    image = torch.randn(2, 12, *sites, generator=torch.Generator().manual_seed(1)) + mean
    statistics = partial_statistics(image)
    area = image.shape[2:].numel()
    assert statistics.shape == (2, run_count(area), 2, 12)
    assert statistics.dtype == torch.float32
    added = torch.linspace(-3, 3, 12)[None]
    grouped = (image.double() + added.reshape(1, -1, *(1,) * len(sites))).reshape(2, 3, -1)
    centre, variance = group_moments(statistics, area, 3, added)
    torch.testing.assert_close(centre.double(), grouped.mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), grouped.var(-1, unbiased=False), rtol=2e-5, atol=2e-7 * mean)


def test_statistics_of_another_shape_are_refused() -> None:
    statistics = partial_statistics(torch.randn(2, 12, 11, 13))
    check(statistics, 2, 12, 143)
    for rows, channels, sites in ((3, 12, 143), (2, 24, 143), (2, 12, 64)):
        with pytest.raises(ValueError, match="partial_stats: got shape"):
            check(statistics, rows, channels, sites)


def test_the_heuristic_takes_one_pass_for_small_groups_and_two_for_large_ones() -> None:
    group_norm_config = pytest.importorskip("stepfuse.kernels.group_norm_silu.config")
    choose, one, two = group_norm_config.heuristic, group_norm_config.OnePass, group_norm_config.TwoPass
    assert isinstance(choose(2, 32, 40, 64), one)
    assert isinstance(choose(2, 32, 20, 1024), one)
    assert isinstance(choose(2, 32, 10, 128 * 128), two)
    assert isinstance(choose(2, 32, 40, 64, statistics=True), two)
    for width, sites in ((4, 1), (10, 4096), (80, 64), (96, 1024), (4, 1 << 24)):
        assert choose(1, 32, width, sites) is not None
        assert group_norm_config.search_space(1, 32, width, sites)
