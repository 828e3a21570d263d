"""The op `sampler_step`: rows are independent, finished rows rest, zero coefficients read nothing, guidance weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stepfuse.engine.sampling.guidance import cfg_weights, guidance_embedding, rescale_weights, uses_guidance
from stepfuse.engine.sampling.noise import philox_normal
from stepfuse.engine.sampling.planning import make_plan
from stepfuse.engine.sampling.schedules import SchedulerConfig
from stepfuse.engine.sampling.update import Plan, stack_tables
from stepfuse.kernels import sampler_step as OP
from stepfuse.kernels.sampler_step.columns import Column
from stepfuse.kernels.sampler_step.reference import sampler_step

CONFIG = SchedulerConfig.from_diffusers(
    {"_class_name": "DDIMScheduler", "clip_sample": True, "clip_sample_range": 2.0, "skip_prk_steps": True}
)
PLANS = [
    make_plan(CONFIG, steps=3, sampler="ddim", eta=0.7),
    make_plan(CONFIG, steps=4, sampler="heun"),
    make_plan(CONFIG, steps=6, sampler="lms"),
    make_plan(CONFIG, steps=5, sampler="dpmpp_2m", schedule="karras"),
    make_plan(CONFIG, steps=5, sampler="pndm"),
    make_plan(CONFIG, steps=4, sampler="euler_a"),
    make_plan(CONFIG, steps=4, sampler="lcm"),
]
SIZE = (4, 6, 7)


def state(rows: int, branches: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    plans = [PLANS[i % len(PLANS)] for i in range(rows)]
    unit = torch.randn(rows, *SIZE, generator=generator).to(dtype)
    scale = torch.tensor([p.init_scale for p in plans], dtype=dtype).reshape(-1, 1, 1, 1)
    return {
        "x": unit * scale,
        "base": torch.zeros(rows, *SIZE, dtype=dtype),
        "history": torch.zeros(rows, 3, *SIZE, dtype=dtype),
        "model_output": torch.randn(rows, branches, *SIZE, generator=generator).to(dtype),
        "table": torch.from_numpy(stack_tables(plans)).to(dtype),
        "update": torch.zeros(rows, dtype=torch.int64),
        "weights": cfg_weights([3.0 + i for i in range(rows)]).to(dtype)[:, :branches],
        "seeds": torch.arange(rows) * 1000 + 5,
    }


def step(s: dict[str, Any], **options: Any) -> tuple[dict[str, Any], Tensor, Tensor]:
    """One op call; the next state (update advanced, model output from a fixed function), network input, nonfinite."""
    x, base, history, model_input, bad = sampler_step(**s, **options)
    outputs = torch.stack((torch.tanh(model_input), torch.cos(model_input)), 1)
    following = {**s, "x": x, "base": base, "history": history, "model_output": outputs, "update": s["update"] + 1}
    return following, model_input, bad


def rows_of(s: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in s.items()}


def test_rows_do_not_depend_on_each_other() -> None:
    s, order = state(7), [4, 0, 6, 2]
    part = rows_of(s, order)
    singles = [rows_of(s, [i]) for i in range(7)]
    for _ in range(10):
        s, model_input, _ = step(s)
        part, part_input, _ = step(part)
        assert torch.equal(model_input[order], part_input)
        for i, single in enumerate(singles):
            singles[i], _, _ = step(single)
            for name in ("x", "base", "history"):
                assert torch.equal(singles[i][name][0], s[name][i])
    assert torch.equal(s["x"][order], part["x"])


def test_finished_rows_rest() -> None:
    s = state(7)
    finals: dict[int, Tensor] = {}
    for i in range(12):
        s, model_input, bad = step(s)
        assert not bad.any()
        for row, plan in enumerate(PLANS):
            if i == len(plan.updates) - 1:
                finals[row] = s["x"][row].clone()
                assert torch.equal(model_input[row], s["x"][row])
            if row in finals:
                assert torch.equal(s["x"][row], finals[row])
    assert len(finals) == 7
    beyond = {**s, "update": torch.full((7,), 10**6), "model_output": torch.full_like(s["model_output"], math.nan)}
    after, _, bad = step(beyond)
    for name in ("x", "base", "history"):
        assert torch.equal(after[name], s[name])
    assert not bad.any()
    free = {**beyond, "x": torch.full_like(s["x"], math.nan)}
    assert not step(free)[2].any()
    unstarted, _, _ = step({**s, "update": torch.full((7,), -1)})
    assert torch.equal(unstarted["x"], s["x"])


def test_equals_the_formulas_of_the_table() -> None:
    """Every column, in float64, against the formulas written out with numpy, on a random table; some rows limited."""
    generator = np.random.default_rng(3)
    rows, lines, shape = 3, 4, (2, 3, 5)
    table = generator.normal(size=(rows, lines, len(Column)))
    table[..., Column.LIVE] = 1.0
    table[..., Column.CLAMP] = np.abs(table[..., Column.CLAMP]) + 0.2
    table[..., Column.KEEP_BASE] = generator.integers(0, 2, size=(rows, lines))
    table[..., Column.PUSH] = generator.integers(0, 2, size=(rows, lines))
    x, base = generator.normal(size=(2, rows, *shape))
    history, output = generator.normal(size=(rows, 3, *shape)), generator.normal(size=(rows, 2, 4, 3, 5))
    mask, known = generator.uniform(size=(rows, 1, 3, 5)), generator.normal(size=(rows, 2, *shape))
    weights, noise = generator.normal(size=(rows, 2)), generator.normal(size=(rows, 2, *shape))
    limit = np.array([1.1, 0.0, -0.3])
    for at in range(lines - 1):
        tensors = [torch.from_numpy(a) for a in (x, base, history, output, table)]
        position = torch.full((rows,), at)
        options = {n: torch.from_numpy(a) for n, a in (("mask", mask), ("known", known), ("limit", limit))}
        seeds = torch.zeros(rows, dtype=torch.int64)
        results = sampler_step(*tensors, position, torch.from_numpy(weights), seeds, torch.from_numpy(noise), **options)
        for r in range(rows):
            c = {column: table[r, at, column] for column in Column}
            guided = weights[r, 0] * output[r, 0, :2] + weights[r, 1] * output[r, 1, :2]
            raw = c[Column.P] * x[r] + c[Column.Q] * guided
            D = np.clip(raw, -c[Column.CLAMP], c[Column.CLAMP])
            if limit[r] > 0:
                D = np.clip(raw, -limit[r], limit[r]) / limit[r]
            scale = np.exp(c[Column.V_LOG] * output[r, 0, 2:])
            H, xi, before = history[r], noise[r, 0], noise[r, 1]
            x_new = c[Column.A] * x[r] + c[Column.B] * D + c[Column.B_RAW] * raw + c[Column.G] * base[r]
            x_new += c[Column.C1] * H[0] + c[Column.C2] * H[1] + c[Column.C3] * H[2]
            x_new += c[Column.S] * scale * xi + c[Column.SP] * before
            m = mask[r] >= c[Column.THRESHOLD] if c[Column.THRESHOLD] > 0 else mask[r]
            x_new = m * x_new + (1 - m) * (c[Column.KNOWN] * known[r, 0] + c[Column.KNOWN_NOISE] * known[r, 1])
            base_new = c[Column.A2] * x[r] + c[Column.B2] * D + c[Column.G2] * base[r] + c[Column.SP2] * before
            base_new += c[Column.C21] * H[0] + c[Column.C22] * H[1] + c[Column.C23] * H[2]
            pushed = np.stack((c[Column.EX] * x[r] + c[Column.ED] * D, H[0], H[1]))
            expected = (
                x_new,
                base[r] if c[Column.KEEP_BASE] else base_new,
                pushed if c[Column.PUSH] else H,
                table[r, at + 1, Column.C_IN] * x_new,
            )
            for ours, theirs in zip(results, expected, strict=False):
                assert np.abs(ours[r].numpy() - theirs).max() < 1e-13


def inpainted(s: dict[str, Any], level: tuple[float, float] = (0.8, 0.6), threshold: float = 0.0) -> dict[str, Any]:
    """A call that puts a known image back in every row, with a random soft mask."""
    generator = torch.Generator().manual_seed(11)
    rows, dtype = len(s["x"]), s["x"].dtype
    table = s["table"].clone()
    table[..., [Column.KNOWN, Column.KNOWN_NOISE, Column.THRESHOLD]] = torch.tensor([*level, threshold], dtype=dtype)
    mask = torch.rand(rows, 1, *SIZE[1:], generator=generator).to(dtype)
    mask[..., 0], mask[..., 1] = 0.0, 1.0
    return {**s, "table": table, "mask": mask, "known": torch.randn(rows, 2, *SIZE, generator=generator).to(dtype)}


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_known_image_is_put_back_at_its_level(threshold: float) -> None:
    s = state(7, dtype=torch.float64)
    s["update"] = torch.tensor([1, 0, 2, 1, 0, 3, 2])
    free, _, _ = step(s)
    call = inpainted(s, threshold=threshold)
    found, model_input, _ = step(call)
    image = 0.8 * call["known"][:, 0] + 0.6 * call["known"][:, 1]
    m = (call["mask"] >= threshold).double() if threshold else call["mask"]
    expected = m * free["x"] + (1 - m) * image
    assert torch.allclose(found["x"], expected, rtol=0, atol=1e-14)
    assert torch.equal(found["x"][..., 0], image[..., 0])
    assert torch.equal(found["x"][..., 1], free["x"][..., 1])
    for name in ("base", "history"):
        assert torch.equal(found[name], free[name])
    c_in = s["table"][torch.arange(7), (s["update"] + 1).clamp(max=s["table"].shape[1] - 1), Column.C_IN]
    live = s["table"][torch.arange(7), (s["update"] + 1).clamp(max=s["table"].shape[1] - 1), Column.LIVE] != 0
    expected_input = torch.where(live, c_in, 1.0).reshape(-1, 1, 1, 1) * found["x"]
    assert torch.allclose(model_input, expected_input, rtol=1e-15, atol=0)


def test_rows_without_a_known_image_do_not_notice_a_mask() -> None:
    s = state(7)
    clean = sampler_step(**s)
    nan = {name: torch.full_like(value, math.nan) for name, value in inpainted(s).items() if name in ("mask", "known")}
    for found, expected in zip(sampler_step(**s, **nan), clean, strict=True):
        assert torch.equal(found, expected)
    call = inpainted(s)
    call["table"][::2] = s["table"][::2]
    call["known"][::2] = math.nan
    mixed = sampler_step(**call)
    assert torch.equal(mixed[0][::2], clean[0][::2])
    assert not mixed[4].any()
    assert all(not torch.equal(a, b) for a, b in zip(mixed[0][1::2], clean[0][1::2], strict=True))


def test_finished_rows_rest_under_a_mask() -> None:
    call = inpainted(state(7))
    call["update"] = torch.full((7,), 10**6)
    assert torch.equal(sampler_step(**call)[0], call["x"])


@pytest.mark.parametrize(
    ("column", "factor"), [(Column.V_LOG, lambda c, v: torch.exp(c * v)), (Column.V_ROOT, lambda c, v: c * v.sqrt())]
)
def test_learned_variance_scales_the_noise_of_every_element(column: Column, factor: Any) -> None:
    s = state(7, dtype=torch.float64)
    prediction, v = s["model_output"], torch.rand(7, 2, *SIZE, dtype=torch.float64)
    both = torch.cat((prediction, v), 2)
    s["update"], s["table"] = torch.tensor([1, 0, 2, 1, 0, 3, 2]), s["table"].clone()
    s["table"][..., Column.S], s["table"][..., Column.SP] = 0.5, 0.25
    noise = torch.randn(7, 2, *SIZE, dtype=torch.float64)
    plain = sampler_step(**s, extra_noise=noise)
    unasked = sampler_step(**{**s, "model_output": torch.cat((prediction, v * math.nan), 2)}, extra_noise=noise)
    for a, b in zip(plain, unasked, strict=True):
        assert torch.equal(a, b)
    s["table"][..., column] = 0.7
    found = sampler_step(**{**s, "model_output": both}, extra_noise=noise)
    expected = 0.5 * noise[:, 0] * (factor(0.7, v[:, 0]) - 1)
    live = s["table"][torch.arange(7), s["update"].clamp(max=s["table"].shape[1] - 1), Column.LIVE] != 0
    difference = torch.where(live.reshape(-1, 1, 1, 1), expected, 0.0)
    assert torch.allclose(found[0] - plain[0], difference, rtol=0, atol=1e-12)
    for i in (1, 2):
        assert torch.equal(found[i], plain[i])


def test_a_window_of_the_table_is_enough() -> None:
    s = state(7)
    first = torch.tensor([0, 1, 2, 1, 0, 3, 2])
    window = torch.stack([s["table"][row, at : at + 3] for row, at in enumerate(first.tolist())])
    for ahead in (0, 1):
        call = {**s, "update": first + ahead}
        for found, expected in zip(
            sampler_step(**{**call, "table": window, "first_line": first}), sampler_step(**call), strict=True
        ):
            assert torch.equal(found, expected)
    before = sampler_step(**{**s, "table": window, "first_line": first, "update": first - 1})
    assert torch.equal(before[0], s["x"])


def mapped(s: dict[str, Any], kept: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """The call with model rows: row r has its first kept[r] branches; the others weigh 0 and point at its first."""
    starts = [sum(kept[:row]) for row in range(len(kept))]
    width = s["weights"].shape[1]
    rows = [[start + (j if j < n else 0) for j in range(width)] for start, n in zip(starts, kept, strict=True)]
    weights = s["weights"].clone()
    for row, n in enumerate(kept):
        weights[row, n:] = 0.0
    output = torch.cat([s["model_output"][row, :n] for row, n in enumerate(kept)]).to(dtype)
    return {**s, "weights": weights, "model_output": output, "model_rows": torch.tensor(rows)}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1, 2])
def test_model_rows_are_read_and_written_as_the_network_has_them(
    factor: int, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    s = state(5)
    s["model_output"] = torch.cat((s["model_output"],) * factor, 2)
    kept = [2, 1, 2, 1, 2]
    call = mapped(s, kept, dtype)
    dense = {**s, "weights": call["weights"], "model_output": s["model_output"].to(dtype)}
    call["model_output"] = call["model_output"].contiguous(memory_format=layout)
    found, expected = sampler_step(**call), sampler_step(**dense)
    for i in (0, 1, 2, 4):
        assert torch.equal(found[i], expected[i])
    owners = [row for row, n in enumerate(kept) for _ in range(n)]
    assert found[3].dtype == dtype
    assert torch.equal(found[3], expected[3].to(dtype)[owners])
    assert found[3].is_contiguous(memory_format=layout)
    copies = {name: value.clone() for name, value in call.items()}
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.stepfuse, OP.name), (), call, test_utils=tests)
    assert all(torch.equal(call[name], copy) for name, copy in copies.items())
    empty = {name: value[:0] for name, value in call.items()}
    assert sampler_step(**empty)[3].shape == (0, *SIZE)


def test_arguments_that_do_not_go_together_are_refused() -> None:
    s = state(2)
    call = inpainted(s)
    for name in ("mask", "known"):
        with pytest.raises(ValueError, match="give mask and known, or neither"):
            sampler_step(**{**call, name: None})
    with pytest.raises(ValueError, match=r"3 channels, the state 4; expected as many, or 8"):
        sampler_step(**{**s, "model_output": s["model_output"][:, :, :3]})


def test_noise_is_philox_of_seed_and_update() -> None:
    s = state(7)
    s["update"] = torch.tensor([1, 0, 2, 1, 0, 3, 2])
    given = torch.stack([philox_normal(s["seeds"], s["update"] - k, list(SIZE), stream=4) for k in (0, 1)], 1)
    drawn, _, _ = step(s, noise_stream=4)
    external, _, _ = step(s, extra_noise=given)
    assert torch.equal(drawn["x"], external["x"])
    other, _, _ = step(s, noise_stream=5)
    differs = [not torch.equal(a, b) for a, b in zip(drawn["x"], other["x"], strict=True)]
    stochastic = [bool(p.table()[int(u), Column.S]) for p, u in zip(PLANS, s["update"], strict=True)]
    assert differs == stochastic
    assert sum(stochastic) == 2
    one, _, _ = step(s, noise_stream=4, draws=1)
    assert torch.equal(one["x"], drawn["x"])
    none, _, _ = step(s, draws=0)
    assert [torch.equal(a, b) for a, b in zip(none["x"], drawn["x"], strict=True)] == [not t for t in stochastic]


def test_previous_noise_is_drawn_again() -> None:
    s = state(2)
    s["table"] = s["table"].clone()
    s["table"][..., Column.SP] = 0.5
    s["table"][..., Column.SP2] = 0.25
    s["table"][..., Column.KEEP_BASE] = 0.0
    s["update"] = torch.tensor([1, 2])
    previous = philox_normal(s["seeds"], s["update"] - 1, list(SIZE))
    after, _, _ = step(s)
    s["table"][..., Column.SP] = 0.0
    s["table"][..., Column.SP2] = 0.0
    without, _, _ = step(s)
    assert torch.allclose(after["x"] - without["x"], 0.5 * previous, atol=1e-5)
    assert torch.allclose(after["base"] - without["base"], 0.25 * previous, atol=1e-6)


def test_zero_coefficients_read_nothing() -> None:
    s = state(7)
    clean, _, _ = step(s)
    poisoned = {**s, "base": torch.full_like(s["base"], math.nan), "history": torch.full_like(s["history"], math.inf)}
    branch = torch.full_like(s["model_output"][:, :1], math.nan)
    poisoned["model_output"] = torch.cat((s["model_output"], branch), 1)
    poisoned["weights"] = torch.cat((s["weights"], torch.zeros(7, 1)), 1)
    dirty, _, bad = step(poisoned)
    assert torch.equal(dirty["x"], clean["x"])
    assert not bad.any()


def test_nonfinite_rows_are_reported_alone() -> None:
    s = state(7)
    s["model_output"][2, 0, 0, 0, 0] = math.nan
    s["x"][5, 1, 2, 3] = math.inf
    _, _, bad = step(s)
    assert bad.tolist() == [False, False, True, False, False, True, False]


def test_inputs_are_untouched_and_outputs_are_new() -> None:
    s = state(7)
    copies = {name: value.clone() for name, value in s.items()}
    results = sampler_step(**s)
    for name, value in s.items():
        assert torch.equal(value, copies[name])
    pointers = {value.data_ptr() for value in s.values()}
    assert all(result.data_ptr() not in pointers for result in results)
    empty = sampler_step(**rows_of(s, []))
    assert [tuple(r.shape) for r in empty] == [(0, *SIZE), (0, *SIZE), (0, 3, *SIZE), (0, *SIZE), (0,)]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.sampler)
def test_float32_follows_float64(plan: Plan) -> None:
    row = PLANS.index(plan)
    single, double = (rows_of(state(7, dtype=dtype), [row]) for dtype in (torch.float32, torch.float64))
    single["weights"], double["weights"] = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    for _ in plan.updates:
        single, _, _ = step(single)
        double, _, _ = step(double)
        scale = max(1.0, float(double["x"].square().mean().sqrt()))
        assert float((single["x"] - double["x"]).abs().max()) / scale < 1e-5


def test_cfg_weights() -> None:
    weights = cfg_weights([7.5, 1.0, 0.0, 2.0])
    assert weights.tolist() == [[7.5, -6.5], [1.0, 0.0], [1.0, 0.0], [2.0, -1.0]]
    assert [uses_guidance(g) for g in (7.5, 1.0, 0.0)] == [True, False, False]


def test_guidance_rescale_equals_diffusers() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    generator = torch.Generator().manual_seed(1)
    output = torch.randn(3, 2, 4, 8, 8, generator=generator) + 0.2
    weights = cfg_weights([7.5, 4.0, 9.0])
    rescaled = rescale_weights(output, weights, torch.tensor([0.7, 0.0, 0.3]))
    assert torch.equal(rescaled[1], weights[1])
    for row, phi in enumerate((0.7, 0.0, 0.3)):
        cond, uncond = output[row : row + 1, 0], output[row : row + 1, 1]
        guided = uncond + float(weights[row, 0]) * (cond - uncond)
        expected = rescale_noise_cfg(guided, cond, phi)
        ours = rescaled[row, 0] * cond + rescaled[row, 1] * uncond
        assert (ours - expected).abs().max() < 2e-5
        assert torch.allclose(rescale_weights(output[[row]], weights[[row]], torch.tensor([phi]))[0], rescaled[row])


@pytest.mark.parametrize("dim", [256, 7])
def test_guidance_embedding_equals_diffusers(dim: int) -> None:
    from diffusers import LatentConsistencyModelPipeline

    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([7.5, 1.5]), dim)
    assert torch.allclose(guidance_embedding(torch.tensor([8.5, 2.5]), dim), theirs, atol=1e-6)
