"""Networks of the user's in the engine: exact denoisers of Gaussians and mixtures, against closed forms and by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.exact import EXACT, MEAN, VARIANCE, conditional, epsilon, rows
from torch import Tensor, nn

from stepfuse import Engine, EngineConfig, Request
from stepfuse.engine.config import merge
from stepfuse.engine.errors import RequestError
from stepfuse.engine.sampling.noise import philox_normal
from stepfuse.engine.sampling.planning import make_plan
from stepfuse.engine.sampling.schedules import beta_table
from stepfuse.engine.sampling.update import Plan
from stepfuse.engine.user_module import user_components

SAMPLERS = ("ddim", "ddpm", "euler", "euler_a", "heun", "lms", "dpmpp_2m", "pndm")


def gaussian(shape: Any = (400, 3), **options: Any) -> Engine:
    options = {"time": "sigma", "device": "cpu", **options}
    return Engine.from_module(epsilon, shape, **options)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(plan: Plan, x: Tensor, network: Callable[..., Tensor], seed: int, told: list[float]) -> Tensor:
    """The table of a plan on one row, line by line in float64, as `Column` says it."""
    x = plan.init_scale * x.double()
    base, history = x, [torch.zeros_like(x)] * 3
    for number, (u, t) in enumerate(zip(plan.updates, told, strict=True)):
        output = network(u.c_in * x[None], torch.tensor([t], dtype=torch.float64))[0]
        denoised = u.p * x + u.q * output
        xi, before = drawn(seed, number, x), drawn(seed, number - 1, x)
        past = sum(c * h for c, h in zip((u.C1, u.C2, u.C3), history, strict=True))
        past2 = sum(c * h for c, h in zip((u.C21, u.C22, u.C23), history, strict=True))
        made = u.A * x + (u.B + u.B_raw) * denoised + u.G * base + past + u.S * xi + u.Sp * before
        second = u.A2 * x + u.B2 * denoised + u.G2 * base + past2 + u.Sp2 * before
        history = [u.ex * x + u.eD * denoised, *history[:2]] if u.push else history
        x, base = made, base if u.keep_base else second
    return x


def drawn(seed: int, update: int, x: Tensor) -> Tensor:
    if update < 0:
        return torch.zeros_like(x)
    return philox_normal(torch.tensor([seed]), torch.tensor([update]), list(x.shape)).reshape(x.shape).double()


def ratios(plan: Plan) -> list[float]:
    return [u.sigma / u.alpha for u in plan.updates]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with gaussian() as made:
        yield made


# Against the truth.


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "lms", "pndm"])
def test_a_deterministic_sampler_follows_the_exact_flow(engine: Engine, sampler: str):
    """The probability flow of a Gaussian is affine: x0 = m + sqrt(v / (v + s^2)) (x_s - m), of x_s = x0 + s eps."""
    plan = make_plan(engine.components.scheduler, steps=200, sampler=sampler)
    first = plan.updates[0]
    sigma = first.sigma / first.alpha
    start = plan.init_scale * noise(4, 400, 3) / first.alpha
    expected = MEAN + math.sqrt(VARIANCE / (VARIANCE + sigma**2)) * (start - MEAN)
    found = engine.generate(seed=4, steps=200, sampler=sampler).images[0]
    assert relative(found, expected) < 2e-3
    assert abs(float(found.mean()) - MEAN) < 4 * math.sqrt(VARIANCE / 1200)
    assert abs(float(found.var()) - VARIANCE) < 4 * VARIANCE * math.sqrt(2 / 1200)


@pytest.mark.parametrize("sampler", ["ddpm", "euler_a"])
def test_a_stochastic_sampler_reaches_mean_and_variance(engine: Engine, sampler: str):
    found = engine.generate(seed=0, n=8, steps=400, sampler=sampler).images
    count = found.numel()
    assert abs(float(found.mean()) - MEAN) < 4 * math.sqrt(VARIANCE / count)
    assert abs(float(found.var()) / VARIANCE - 1) < 0.03  # 400 steps of first order narrow it by about 0.02


def test_moments_of_a_mixture():
    """Two-dimensional points, an exact score: share, means and deviations of the components."""
    means, weights, deviation = torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), torch.tensor([0.3, 0.7]), 0.3

    def mixture(x: Tensor, sigma: Tensor) -> Tensor:
        s = rows(sigma, x)
        norm = torch.sqrt(1 + s * s)
        offset = x[..., None, :] - (means / norm[..., None])  # [R, P, K, 2]
        variance = (deviation**2 + s * s) / (norm * norm)
        logits = weights.log() - offset.square().sum(-1) / (2 * variance)
        return -(logits.softmax(-1)[..., None] * offset).sum(-2) / variance

    with Engine.from_module(mixture, (500, 2), prediction="score", time="sigma", device="cpu") as made:
        points = made.generate(seed=1, n=8, steps=60).images.flatten(0, 1)
    right = points[:, 0] > 0
    assert abs(float(right.float().mean()) - 0.7) < 4 * math.sqrt(0.3 * 0.7 / len(points))
    for part, mean in ((~right, means[0]), (right, means[1])):
        count = int(part.sum())
        assert float((points[part].mean(0) - mean).abs().max()) < 4 * deviation / math.sqrt(count)
        assert float((points[part].std(0) / deviation - 1).abs().max()) < 4 / math.sqrt(2 * count) + 0.01


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equals_the_table_by_hand(sampler: str, dtype: str, bound: float):
    with gaussian((3, 4, 5), dtype=dtype) as made:
        plan = make_plan(made.components.scheduler, steps=20, sampler=sampler)
        ended = made.generate(seed=9, n=2, steps=20, sampler=sampler)
    found = ended.images
    assert found.dtype == ended.latents.dtype == getattr(torch, dtype)
    for index in range(2):
        expected = by_hand(plan, noise(9 + index, 3, 4, 5), epsilon, 9 + index, ratios(plan))
        assert relative(found[index], expected) < bound


@pytest.mark.parametrize("prediction", EXACT)
def test_all_predictions_describe_the_same_samples(prediction: str):
    time = None if prediction == "flow" else "sigma"
    how: dict[str, Any] = {"dtype": "float64", "device": "cpu"}
    with gaussian((7, 2), **how) as reference:
        expected = reference.generate(seed=3, steps=12).images
    with Engine.from_module(EXACT[prediction], (7, 2), prediction=prediction, time=time, **how) as made:
        assert relative(made.generate(seed=3, steps=12).images, expected) < 1e-9


def test_the_timestep_is_told_by_default():
    seen: list[float] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return x

    with Engine.from_module(network, 2, device="cpu") as made:
        made.generate(steps=4, sampler="ddim", seed=0)
    assert seen == [750.0, 500.0, 250.0, 0.0]


@pytest.mark.parametrize("sampler", ["heun", "ddim", "lcm"])
def test_a_schedule_is_the_same_for_every_sampler_however_it_is_given(sampler: str):
    betas = beta_table("linear", 1e-4, 0.02, 1000)
    bar = np.cumprod(1 - betas)
    found = []
    for schedule in ("linear", {"beta_end": 0.02}, bar, torch.from_numpy(bar), list(bar)):
        with gaussian(5, schedule=schedule, dtype="float64") as made:
            plan = make_plan(made.components.scheduler, steps=10, sampler=sampler)
            found.append(torch.tensor([(u.alpha, u.sigma) for u in plan.updates], dtype=torch.float64))
    assert all(torch.allclose(one, found[0], rtol=1e-9) for one in found)
    level = found[0][0]
    assert float(level[0] / level.norm()) ** 2 == pytest.approx(bar[999 if sampler != "ddim" else 900], rel=1e-6)


# Conditioning and guidance.


def test_two_branches_equal_the_closed_form_of_guidance():
    """eps is affine in the mean, so g eps(c) + (1 - g) eps(n) is eps(g c + (1 - g) n)."""
    c, n, g = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 2.0]]), 3.0
    with Engine.from_module(conditional, (6, 2), conditioning=2, time="sigma", dtype="float64", device="cpu") as made:
        how: dict[str, Any] = {"seed": 2, "steps": 15, "n": 2}
        guided = made.generate(conditioning=c, negative_conditioning=n, guidance_scale=g, **how).images
        direct = made.generate(conditioning=g * c + (1 - g) * n, **how).images
        other = made.generate(conditioning=c, **how).images
        each = made.generate(conditioning=torch.cat([c, n]), **how).images
        unused = made.generate(conditioning=c, negative_conditioning=n, **how)
    assert relative(guided, direct) < 1e-12
    assert relative(guided, other) > 0.1
    assert torch.equal(each[0], other[0])
    assert relative(each[1], other[1]) > 0.1
    assert any("negative_conditioning has no effect" in warning for warning in unused.warnings)


def test_labels_and_lists_of_different_lengths():
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.means = nn.Embedding(3, 1)

        def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
            return epsilon(x, sigma, self.means(label.long()))

    module = Labelled()
    with Engine.from_module(module, 4, conditioning=(), time="sigma") as made:
        found = made.generate(conditioning=torch.tensor([0, 2]), n=2, seed=0, steps=30).images.mean(1)
    assert found.shape == (2,)
    with Engine.from_module(lambda x, s, c: epsilon(x, s, c.mean((1, 2))[:, None]), 4, conditioning=(None, 2),
                            time="sigma", device="cpu") as made:  # fmt: skip
        jobs = [made.submit(conditioning=torch.full((1, length, 2), 4.0), seed=0, steps=10) for length in (1, 3, 1)]
        ended = [job.result().images for job in jobs]
    assert relative(ended[0], ended[1]) < 1e-6
    assert torch.equal(ended[0], ended[2])


# Rows.


MIXED: tuple[dict[str, Any], ...] = (
    {"seed": 1, "steps": 8, "sampler": "ddim"},
    {"seed": 2, "steps": 20, "sampler": "euler_a", "guidance_scale": 2.0, "n": 2},
    {"seed": 3, "steps": 15, "sampler": "dpmpp_2m", "schedule": "karras", "shape": (9, 2)},
    {"seed": 4, "steps": 12, "sampler": "heun", "guidance_scale": 1.5, "guidance_rescale": 0.5},
    {"seed": 5, "steps": 100, "sampler": "ddpm"},
    {"seed": 6, "steps": 10, "sampler": "euler", "shape": (9, 2), "guidance_scale": 4.0},
)


def mixed(made: Engine) -> list[tuple[Tensor, Tensor]]:
    """Every request among the others, and alone."""
    means = {"conditioning": torch.tensor([[1.0, 2.0]]), "negative_conditioning": torch.tensor([[0.0, 0.0]])}
    requests = [Request(**{"shape": (6, 2), **means, **fields}) for fields in MIXED]
    together = [job.result().images for job in [made.submit(request) for request in requests]]
    return [(one, made.generate(request).images) for one, request in zip(together, requests, strict=True)]


def test_a_row_is_the_same_alone_and_among_others_of_any_shape():
    seen: set[tuple[int, ...]] = set()

    def network(x: Tensor, sigma: Tensor, mean: Tensor) -> Tensor:
        seen.add(tuple(x.shape))
        return conditional(x, sigma, mean)

    with Engine.from_module(network, (None, 2), conditioning=2, time="sigma", device="cpu") as made:
        for one, alone in mixed(made):
            assert relative(one, alone) < 1e-5
    assert {shape[1:] for shape in seen} == {(6, 2), (9, 2)}
    assert max(shape[0] for shape in seen) > 4, "rows of several requests in one call"


def test_deterministic_mode_is_bit_equal():
    options: dict[str, Any] = {"conditioning": 2, "time": "sigma", "device": "cpu", "deterministic": 4}
    with Engine.from_module(conditional, (None, 2), **options) as made:
        assert all(torch.equal(one, alone) for one, alone in mixed(made))


@pytest.mark.slow
def test_compiled_equals_eager():
    options: dict[str, Any] = {"conditioning": 2, "time": "sigma", "device": "cpu", "max_rows": 2}
    found = []
    for runner in ("eager", "compiled"):
        with Engine.from_module(conditional, (6, 2), runner=runner, **options) as made:
            means = {"conditioning": torch.ones(1, 2), "negative_conditioning": torch.zeros(1, 2)}
            found.append(made.generate(seed=1, n=2, steps=10, guidance_scale=2.0, **means).images)
    assert relative(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("shape", [(), 5, (2, 3), (2, 3, 4), (2, 3, 2, 2), (None,), (2, None), (None, 2, None)])
def test_any_shape(shape: Any):
    asked = tuple(axis or 3 for axis in (shape if isinstance(shape, tuple) else (shape,)))
    seen: set[tuple[int, ...]] = set()

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        seen.add(tuple(x.shape[1:]))
        return epsilon(x, sigma)

    with Engine.from_module(network, shape, time="sigma", device="cpu") as made:
        found = made.generate(shape=asked, n=2, seed=5, steps=3)
        again = made.generate(latents=torch.stack([noise(5, *asked), noise(6, *asked)]), n=2, steps=3, output="np")
    assert seen == {asked}
    assert found.images.shape == found.latents.shape == (2, *asked)
    assert found.settings["shape"] == list(asked)
    assert isinstance(again.images, np.ndarray)
    np.testing.assert_array_equal(again.images, found.images.numpy())


def test_a_network_of_the_users_beside_a_checkpoint():
    with Engine.load("shapes", device="cpu") as made:
        made.add("points", user_components(epsilon, (5, 2), merge(EngineConfig(device="cpu"), {}), time="sigma"))
        jobs = [made.submit(model="points", seed=0, steps=5), made.submit("a red circle", seed=0, steps=2)]
        points, picture = (job.result() for job in jobs)
        assert points.images.shape == (1, 5, 2)
        assert picture.image.size == (64, 64)
        with pytest.raises(RequestError, match=r"shape: shapes is no network of Engine\.from_module"):
            made.submit("a red circle", shape=(3,))


def test_events_previews_warmup_and_explain(engine: Engine):
    engine.warmup()
    events = list(engine.stream(seed=1, steps=5, preview_every=2, output="latent"))
    previews = [event.preview for event in events if event.preview is not None]
    assert [preview.shape for preview in previews] == [(1, 400, 3)] * 2
    assert events[-1].result.images is None
    assert events[-1].result.latents.shape == (1, 400, 3)
    assert "epsilon is called as it is" in engine.explain()


# Known values.


def test_a_mask_keeps_single_values_exactly(engine: Engine):
    known = noise(8, 1, 400, 3)
    mask = torch.ones(400, 3)
    mask[:7, 1] = 0
    found = engine.generate(image=known, mask=mask, seed=1, steps=12).images
    assert torch.equal(found[0, :7, 1], known[0, :7, 1])
    free = engine.generate(seed=1, steps=12).images
    assert torch.equal(found[0, 7:], free[0, 7:]), "independent values do not feel it"
    row = engine.generate(image=known, mask=torch.tensor([1.0, 0.0, 1.0]), seed=1, steps=12).images
    assert torch.equal(row[0, :, 1], known[0, :, 1])
    assert not torch.equal(row[0, :, 0], known[0, :, 0])


def test_a_network_in_half_precision_is_given_x_in_its_own_dtype():
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.layer.load_state_dict({"weight": torch.eye(6).roll(1, 0) / 2, "bias": torch.zeros(6)})

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert (x.dtype, t.dtype) == (self.layer.weight.dtype, torch.float32)
            return self.layer(x)

    found: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        with Engine.from_module(Linear().to(dtype), 6, device="cpu") as made:
            found.append(made.generate(seed=1, steps=4, n=2).images)
    assert found[1].dtype == torch.float32
    assert 0 < relative(found[1], found[0]) < 2e-2


def test_a_strength_starts_from_given_values(engine: Engine):
    given = noise(8, 2, 400, 3)
    found = engine.generate(image=given, strength=0.3, n=2, seed=1, steps=20, sampler="ddim").images
    plan = make_plan(engine.components.scheduler, steps=20, sampler="ddim", strength=0.3)
    for index in range(2):
        first = plan.init_alpha * given[index].double() + plan.init_scale * noise(1 + index, 400, 3).double()
        expected = by_hand(plan, first / plan.init_scale, epsilon, 1 + index, ratios(plan))
        assert relative(found[index], expected) < 1e-6
    constant = engine.generate(image=given, change_map=torch.tensor(0.3), n=2, seed=1, steps=20, sampler="ddim").images
    assert relative(constant, found) < 1e-6


def test_the_example_of_the_documentation():
    page = (Path(__file__).parent.parent / "docs" / "user_networks.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)[0]
    names: dict[str, Any] = {}
    exec(code.replace("(500, 2),", "(500, 2), device='cpu',"), names)
    points = names["points"]
    names["engine"].close()
    assert points.shape == (4, 500, 2)
    assert abs(float(points.mean()) - 1) < 4 * math.sqrt(0.25 / 4000)


def test_a_network_of_edms_form():
    """D(x0 + sigma eps, sigma), as the page says to wrap it."""

    def denoiser(noised: Tensor, sigma: Tensor) -> Tensor:
        s = rows(sigma, noised)
        return (VARIANCE * noised + s * s * MEAN) / (VARIANCE + s * s)

    how: dict[str, Any] = {"dtype": "float64", "device": "cpu", "time": "sigma"}
    wrapped = lambda x, s: denoiser(x * torch.sqrt(1 + s**2)[:, None], s)  # noqa: E731
    with gaussian(7, **how) as reference, Engine.from_module(wrapped, 7, prediction="sample", **how) as made:
        expected = reference.generate(seed=3, steps=12).images
        assert relative(made.generate(seed=3, steps=12).images, expected) < 1e-9
