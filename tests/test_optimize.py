"""`stepfuse.optimize`: what our networks inside a diffusers pipeline share, notice and refuse.

Every kind of pipeline against itself before and after is in test_optimize_pipelines.py.
"""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from reference.networks import SD
from reference.pipeline_calls import COMMON, build_call, image_to_image, run
from torch._subclasses.fake_tensor import FakeTensor

import stepfuse
from stepfuse.engine.errors import CheckpointError, RequestError

pytestmark = pytest.mark.slow  # left out by `.ci/run quick`

LATENTS = 1e-4  # relative L2 of the final latents


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture
def load(reference_pipeline: Callable[[str], Path]) -> Callable[[str], tuple[Any, dict[str, Any]]]:
    """Kind of pipeline -> (a fresh diffusers pipeline in float32, the arguments it is called with)."""
    return lambda kind: build_call(kind, reference_pipeline)


def test_our_networks_really_run_and_say_with_what(load) -> None:
    pipe, arguments = load("sd15_controlnet/control")
    calls = []
    fast = stepfuse.optimize(pipe)
    for network in fast.networks:
        network.module.register_forward_hook(lambda *_, name=network.name: calls.append(name))
    vae = next(network for network in fast.networks if network.name == "vae")
    vae.module.decoder.register_forward_hook(lambda *_: calls.append("decoder"))
    run(pipe, arguments, "pt", num_inference_steps=2)
    assert calls.count("unet") == calls.count("controlnet") >= 2
    assert calls.count("decoder") == 1
    assert all(word in fast.explain() for word in ("unet:", "controlnet:", "decoder:", "group_norm_silu", "reference"))


def test_weights_are_shared_not_copied(load) -> None:
    pipe, _ = load("sdxl")
    gc.collect()
    before = _tensor_bytes()
    weights = sum(p.numel() * 4 for part in (pipe.unet, pipe.vae) for p in part.parameters())
    fast = stepfuse.optimize(pipe)
    gc.collect()
    assert _tensor_bytes() - before <= weights / 1000
    for network in fast.networks:
        lent = {id(p) for p in network.source.parameters()}
        assert {id(p) for p in network.module.parameters()} == lent
    fast.restore()
    gc.collect()
    assert _tensor_bytes() == before


def test_matrices_stored_as_convolutions_are_views(load) -> None:
    pipe, _ = load("sd15")
    with stepfuse.optimize(pipe) as fast:
        ours = dict(fast.networks[0].module.named_parameters())
        theirs = dict(pipe.unet.named_parameters())
        flattened = [name for name in ours if ours[name].shape != theirs[name].shape]
        assert all("proj_" in name for name in flattened)
        assert len(flattened) > 10
        assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)


def _tensor_bytes() -> int:
    """Bytes of all tensor storages alive."""
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta and not isinstance(thing, FakeTensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_callbacks_and_options_of_the_pipeline_work_unchanged(load) -> None:
    pipe, arguments = load("sd15")
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    seen: list[int] = []

    def halve_the_batch(pipe: Any, step: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        """Guidance ends after the second step: the usual use of prompt_embeds in a callback."""
        seen.append(step)
        if step == 1:
            pipe._guidance_scale = 0.0
            kept["prompt_embeds"] = kept["prompt_embeds"].chunk(2)[-1]
        return kept

    options = {
        "callback_on_step_end": halve_the_batch,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        "num_images_per_prompt": 2,
        "guidance_rescale": 0.5,
    }
    before = run(pipe, arguments, "pt", **options)
    steps, seen = seen, []
    with stepfuse.optimize(pipe):
        assert relative(run(pipe, arguments, "pt", **options), before) <= LATENTS
        assert pipe.unet.config.in_channels == 4
        assert pipe.unet.dtype == torch.float32
        assert pipe.unet.device.type == "cpu"
    assert seen == steps


def unet_inputs(pipe: Any) -> dict[str, Any]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    config = pipe.unet.config
    inputs = {"sample": normal(2, 4, 8, 8), "encoder_hidden_states": normal(2, 7, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        time_ids = torch.tensor([[64.0, 96, 0, 0, 64, 96], [32, 48, 0, 8, 64, 96]])
        inputs["added_cond_kwargs"] = {"text_embeds": normal(2, 32), "time_ids": time_ids}
    return inputs


@torch.no_grad()
def test_prompts_and_timesteps_are_prepared_once(load) -> None:
    pipe, arguments = load("sdxl")
    with stepfuse.optimize(pipe) as fast:
        module, shapes = fast.networks[0].module, []
        prepare = module.prepare
        module.prepare = lambda c, t: shapes.append((c.hidden.shape[1], t.shape[1])) or prepare(c, t)
        run(pipe, arguments, num_inference_steps=6)
        assert sorted(shapes) == [(0, 6), (77, 0)]  # all times of the schedule for no prompt, the prompt for no time
        shapes.clear()
        inputs = unet_inputs(pipe)
        for timestep in (5, 5.0, torch.tensor(5), torch.tensor([5]), torch.tensor([5, 5])):
            pipe.unet(**inputs, timestep=timestep)
        assert sorted(shapes) == [(0, 1), (0, 1), (7, 0)]  # one row each for the last


@torch.no_grad()
@pytest.mark.parametrize("changed", ["prompt", "pooled", "time_ids", "timestep", "weight", "loaded", "dtype"])
def test_changes_in_place_are_noticed(load, changed: str) -> None:
    pipe, _ = load("sdxl")
    inputs = unet_inputs(pipe) | {"timestep": torch.tensor(400)}
    other = copy.deepcopy(pipe.unet.state_dict())
    for name, tensor in other.items():
        other[name] = tensor * 0.9

    def change() -> None:
        match changed:
            case "prompt":
                inputs["encoder_hidden_states"][1, 2:].mul_(-1)
            case "pooled":
                inputs["added_cond_kwargs"]["text_embeds"][1].add_(1)
            case "time_ids":
                inputs["added_cond_kwargs"]["time_ids"][0, 2] = 24
            case "timestep":
                inputs["timestep"].sub_(150)
            case "weight":
                pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(1.5)
            case "loaded":
                pipe.unet.load_state_dict(other)
            case "dtype":
                pipe.unet.to(torch.float64)
                inputs.update({k: v.double() for k, v in inputs.items() if k in ("sample", "encoder_hidden_states")})

    with stepfuse.optimize(pipe):
        first = pipe.unet(**inputs).sample
        change()
        second = pipe.unet(**inputs).sample
    expected = pipe.unet(**inputs).sample
    assert second.dtype == expected.dtype
    assert relative(second, expected) <= LATENTS
    assert changed == "dtype" or relative(second, first) > 10 * LATENTS


@torch.no_grad()
def test_views_follow_weights_that_move(load) -> None:
    """proj_in of SD 1.x is a convolution here and a matrix in ours: `.to` gives the original new memory."""
    pipe, _ = load("sd15")
    inputs = unet_inputs(pipe)
    with stepfuse.optimize(pipe) as fast:
        pipe.unet(**inputs, timestep=10)
        pipe.unet.to(torch.float64)
        double = {name: tensor.double() for name, tensor in inputs.items()}
        found = pipe.unet(**double, timestep=10, return_dict=False)[0]
        assert {p.dtype for p in fast.networks[0].module.parameters()} == {torch.float64}
    expected = pipe.unet(**double, timestep=10, return_dict=False)[0]
    assert float((found - expected).abs().max() / expected.abs().max()) <= 2e-7


@torch.inference_mode()
def test_inference_mode(load) -> None:
    """Tensors made there have no version: nothing may be kept for them."""
    pipe, _ = load("sd15")
    inputs = unet_inputs(pipe)
    with stepfuse.optimize(pipe):
        pipe.unet(**inputs, timestep=10)
        inputs["encoder_hidden_states"].mul_(-1)
        found = pipe.unet(**inputs, timestep=10).sample
    assert relative(found, pipe.unet(**inputs, timestep=10).sample) <= LATENTS


@torch.no_grad()
def test_transforms_keep_the_result_and_follow_the_weights(load) -> None:
    pipe, arguments = load("sd15")
    before = run(pipe, arguments, "pt")
    with stepfuse.optimize(pipe, transforms=("fused_qkv", "folded_upsample")):
        assert relative(run(pipe, arguments, "pt"), before) <= LATENTS
        pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k.weight.mul_(3)
        found = run(pipe, arguments)
    assert relative(found, run(pipe, arguments)) <= LATENTS


def test_a_pipeline_that_shares_the_networks_is_optimized_too(load) -> None:
    pipe, _ = load("sd15")
    other, arguments = image_to_image(pipe)
    other.set_progress_bar_config(disable=True)
    before = run(other, COMMON | arguments)
    fast = stepfuse.optimize(pipe)
    found = run(other, COMMON | arguments)
    assert 0 < relative(found, before) <= LATENTS
    with pytest.raises(RequestError, match=r"unet is optimized already.*restore\(\)"):
        stepfuse.optimize(other)
    fast.restore()
    fast.restore()
    assert torch.equal(run(other, COMMON | arguments), before)


def test_options_of_a_call_that_are_not_supported(load) -> None:
    pipe, arguments = load("sd15_controlnet/control")
    text, text_arguments = load("sd15")
    with stepfuse.optimize(pipe), stepfuse.optimize(text):
        with pytest.raises(RequestError, match=r"cross_attention_kwargs is not supported.*restore\(\)"):
            run(pipe, arguments, cross_attention_kwargs={"gligen": 1})
        with pytest.raises(RequestError, match="cross_attention_kwargs"):
            run(text, text_arguments, cross_attention_kwargs={"gligen": 1})
        run(text, text_arguments, cross_attention_kwargs={}, num_inference_steps=1)
        inputs = unet_inputs(text) | {"timestep": 1}
        skip = torch.zeros(2, 40, 8, 8)
        for option, word in {
            "encoder_attention_mask": torch.ones(2, 7),
            "attention_mask": torch.ones(2, 7),
            "down_intrablock_additional_residuals": [skip],
            "added_cond_kwargs": {"image_embeds": [skip]},
            "down_block_additional_residuals": [skip],
            "timestep_cond": torch.ones(2, 8),
        }.items():
            with torch.no_grad(), pytest.raises(RequestError, match=r"not supported|takes no timestep_cond"):
                text.unet(**inputs, **{option: word})
        with pytest.raises(RequestError, match="forward only"):
            text.unet(**inputs | {"sample": inputs["sample"].requires_grad_()})
        with torch.no_grad(), pytest.raises(RequestError, match="got 1 rows for 2 latents"):
            text.unet(**inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][:1]})


def _set_processors(pipe: Any) -> None:
    from diffusers.models.attention_processor import SlicedAttnProcessor

    pipe.unet.set_attn_processor(SlicedAttnProcessor(1))


def _add_lora(pipe: Any) -> None:
    """A layer as peft puts it around a projection."""
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    wrapped = type("Linear", (torch.nn.Module,), {"__module__": "peft.tuners.lora.layer"})()
    wrapped.base_layer = attention.to_q
    attention.to_q = wrapped


def _load_ip_adapter(pipe: Any) -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    for attention in (m for m in pipe.unet.modules() if hasattr(m, "set_processor")):
        attention.set_processor(IPAdapterAttnProcessor2_0(attention.to_q.in_features, 32))


def _hook(pipe: Any) -> None:
    pipe.unet.mid_block.register_forward_hook(lambda *_: None)


def _swap_class(pipe: Any) -> None:
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.__class__ = type("ToMeBlock", (type(block),), {"__module__": "tomesd.patch"})


INTRUSIONS: dict[str, tuple[Callable[[Any], None], str]] = {
    "lora": (_add_lora, r"unet\.mid_block.*to_q: LoRA layers.*fuse_lora"),
    "processors": (_set_processors, r"SlicedAttnProcessor is set; call pipe\.unet\.set_default_attn_processor"),
    "ip_adapter": (_load_ip_adapter, r"IPAdapterAttnProcessor2_0.*pipe\.unload_ip_adapter"),
    "fused": (lambda pipe: pipe.fuse_qkv_projections(vae=False), "unfuse_qkv_projections"),
    "freeu": (lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), r"disable_freeu"),
    "hook": (_hook, r"unet\.mid_block: its forward is hooked"),
    "forward": (lambda pipe: vars(pipe.unet.mid_block).update(forward=print), r"unet\.mid_block: its forward"),
    "class": (_swap_class, "tomesd.patch.ToMeBlock is not a layer of diffusers"),
}


@pytest.mark.parametrize("name", INTRUSIONS)
def test_what_ours_would_leave_out_is_an_error_before_and_after(load, name: str) -> None:
    intrude, message = INTRUSIONS[name]
    pipe, arguments = load("sd15")
    fast = stepfuse.optimize(pipe)
    run(pipe, arguments, num_inference_steps=1)
    intrude(pipe)
    with pytest.raises(RequestError, match=message):
        run(pipe, arguments)
    fast.restore()
    with pytest.raises(RequestError, match=message):
        stepfuse.optimize(pipe)
    assert "forward" not in vars(pipe.unet)


def test_pipelines_that_are_not_supported(load) -> None:
    with pytest.raises(RequestError, match="got object, expected a diffusers pipeline"):
        stepfuse.optimize(object())
    pipe, _ = load("sd15")
    whole = pipe.unet
    pipe.unet = torch.compile(whole)
    with pytest.raises(RequestError, match=r"unet: got OptimizedModule, expected UNet2DConditionModel"):
        stepfuse.optimize(pipe)
    pipe.unet = whole
    with pytest.raises(RequestError, match="transforms"):
        stepfuse.optimize(pipe, transforms=("fused",))
    with pytest.raises(RequestError, match="no implementation 'tritn'"):
        stepfuse.optimize(pipe, kernels="tritn")
    gated = {**SD, "attention_type": "gated"}
    pipe.unet = diffusers.UNet2DConditionModel(**gated)
    with pytest.raises(CheckpointError, match="attention_type='gated' is not supported"):
        stepfuse.optimize(pipe)
    pipe.unet = whole
    pipe.vae = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                                         num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    with pytest.raises(RequestError, match=r"vae: got AutoencoderTiny.*vae=False"):
        stepfuse.optimize(pipe)
    assert "forward" not in vars(pipe.unet)
    with stepfuse.optimize(pipe, vae=False) as fast:
        assert [network.name for network in fast.networks] == ["unet"]
    pipe.unet.conv_in.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"1 not part of the model: conv_in\.extra"):
        stepfuse.optimize(pipe, vae=False)


def test_hooks_of_offloading(load) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    pipe, arguments = load("sd15")
    before = run(pipe, arguments)
    add_hook_to_module(pipe.unet, ModelHook())
    with pytest.raises(RequestError, match=r"unet is compiled or hooked.*enable_model_cpu_offload\(\) after it"):
        stepfuse.optimize(pipe)
    remove_hook_from_module(pipe.unet)
    left = vars(pipe.unet)["forward"]  # the original, left on the module
    fast = stepfuse.optimize(pipe)
    add_hook_to_module(pipe.unet, ModelHook())
    assert 0 < relative(run(pipe, arguments), before) <= LATENTS
    with pytest.raises(RequestError, match="remove_all_hooks"):
        fast.restore()
    remove_hook_from_module(pipe.unet)
    fast.restore()
    assert vars(pipe.unet)["forward"] is left
    assert torch.equal(run(pipe, arguments), before)


def test_the_example_of_the_page_runs() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "optimize.md").read_text()
    code = re.search(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert "forward" not in vars(names["pipe"].unet)
    assert names["difference"] <= 1
