"""U-Nets against diffusers: every structure in float64, within 2e-7 of the largest value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.networks import UNETS
from reference.parity import GATE, error, ours
from reference.random_weights import normal
from torch import Tensor, nn

from stepfuse.engine.errors import CheckpointError, RequestError
from stepfuse.engine.models import convolution, projections
from stepfuse.engine.models.layers import LayerNorm, channels_last, to_image, to_tokens
from stepfuse.engine.models.unet import Conditioning, Prepared, Trunk, UNet
from stepfuse.engine.models.unet_blocks import ResBlock, UpBlock
from stepfuse.engine.models.unet_config import UNetConfig
from stepfuse.kernels.dispatch import Site

SIZES = {"square": (16, 16), "odd": (20, 12)}


def conditioning(config: UNetConfig, rows: int, name: str = "") -> Conditioning:
    """Random conditioning of everything the network reads."""
    c, given = config, {}
    if c.blocks.cross_dim:
        given["hidden"] = normal(f"hidden{name}", rows, 7, c.text_dim or c.blocks.cross_dim)
    if c.added_time_dim:
        ids = 6 if c.added_dim == 6 * c.added_time_dim + 32 else 5
        given["pooled"] = normal(f"pooled{name}", rows, c.added_dim - ids * c.added_time_dim)
        given["time_ids"] = (normal(f"ids{name}", rows, ids) * 100).round().abs()
    if c.time_cond_dim:
        given["timestep_cond"] = normal(f"w{name}", rows, c.time_cond_dim)
    if c.class_embedding in ("table", "timestep"):
        given["class_labels"] = torch.arange(1, rows + 1)
    elif c.class_embedding != "none":
        given["class_labels"] = normal(f"class{name}", rows, c.class_dim or c.time_dim)
    return Conditioning(**given)


def expected(module: nn.Module, latents: Tensor, timesteps: Tensor, cond: Conditioning, **more: Any) -> Tensor:
    """What diffusers computes; timesteps: [R]."""
    kwargs: dict[str, Any] = {"class_labels": cond.class_labels, "return_dict": False} | more
    if type(module).__name__ == "UNet2DConditionModel":
        kwargs |= {"encoder_hidden_states": cond.hidden, "timestep_cond": cond.timestep_cond}
        kwargs["added_cond_kwargs"] = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    return module(latents, timesteps, **kwargs)[0]


def check(module: nn.Module, unet: UNet, size: tuple[int, int]) -> float:
    """Error of our network at a size, on two rows at different updates of a table of three."""
    cond = conditioning(unet.config, 2)
    latents = normal("latents", 2, unet.config.in_channels, *size)
    timesteps = torch.tensor([[981.0, 500.0, 3.0], [999.0, 250.5, 1.0]], dtype=torch.float64)
    update = torch.tensor([1, 2])
    got = unet(latents, unet.prepare(cond, timesteps), update)
    return error(got, expected(module, latents, timesteps.gather(1, update[:, None])[:, 0], cond))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", UNETS)
@torch.inference_mode()
def test_unet_matches_diffusers(name: str, size: str, reference_network: Any) -> None:
    module, folder = reference_network(f"unet/{name}")
    unet = ours(folder)
    assert isinstance(unet, UNet)
    shape = SIZES[size]
    if size == "odd" and UNETS[name][0] == "UNet2DConditionModel":
        shape = (13, 10)  # not divisible by the downsampling: skips decide the size on the way up
    assert check(module, unet, shape) <= GATE


@torch.inference_mode()
def test_rows_at_different_updates_are_rows_alone(reference_network: Any) -> None:
    unet = ours(reference_network("unet/sdxl")[1])
    assert isinstance(unet, UNet)
    cond = conditioning(unet.config, 3)
    latents, timesteps = normal("latents", 3, 4, 12, 8), torch.rand(3, 4, dtype=torch.float64) * 999
    update = torch.tensor([3, 0, 2])
    together = unet(latents, unet.prepare(cond, timesteps), update)
    for i in range(3):
        one = Conditioning(**{k: None if v is None else v[i : i + 1] for k, v in vars(cond).items()})
        alone = unet(latents[i : i + 1], unet.prepare(one, timesteps[i : i + 1, update[i] :]), torch.tensor([0]))
        assert error(together[i : i + 1], alone) <= 1e-13


@torch.inference_mode()
def test_prepared_rows_join_and_leave(reference_network: Any) -> None:
    """Rows with their own numbers of updates and prompt lengths: joined, they give what each gives alone."""
    unet = ours(reference_network("unet/sd15")[1])
    assert isinstance(unet, UNet)
    latents = normal("latents", 2, 4, 8, 8)
    parts, alone = [], []
    for i, (updates, length) in enumerate([(2, 9), (5, 4)]):
        cond = Conditioning(hidden=normal(f"hidden{i}", 1, length, 32))
        parts.append(unet.prepare(cond, torch.linspace(900, 100, updates).double()[None]))
        alone.append(unet(latents[i : i + 1], parts[i], torch.tensor([1])))
    joined = Prepared.cat(parts)
    assert joined.kv_len is not None
    assert joined.kv_len.tolist() == [9, 4]
    assert error(unet(latents, joined, torch.tensor([1, 1])), torch.cat(alone)) <= 1e-13
    swapped = Prepared.cat(parts[::-1])
    assert error(unet(latents.flip(0), swapped, torch.tensor([1, 1])), torch.cat(alone[::-1])) <= 1e-13
    assert Prepared.cat(parts[:1] * 2).kv_len is None  # equal lengths need no mask


@torch.inference_mode()
def test_kv_len_hides_the_rest_of_the_prompt(reference_network: Any) -> None:
    unet = ours(reference_network("unet/sd15")[1])
    assert isinstance(unet, UNet)
    hidden, latents = normal("hidden", 2, 9, 32), normal("latents", 2, 4, 8, 8)
    t, update = torch.full((2, 1), 500.0), torch.zeros(2, dtype=torch.int64)
    kv_len = torch.tensor([9, 5], dtype=torch.int32)
    got = unet(latents, unet.prepare(Conditioning(hidden=hidden, kv_len=kv_len), t), update)
    cut = unet(latents[1:], unet.prepare(Conditioning(hidden=hidden[1:, :5]), t[1:]), update[1:])
    assert error(got[1:], cut) <= 1e-13


@pytest.mark.parametrize("name", ["unet/sdxl", "unet/adm", "unet/prompt_projection", "controlnet/sdxl"])
@torch.inference_mode()
def test_prepare_is_one_gemm_per_input_on_weights_stored_once(
    name: str, reference_network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = ours(reference_network(name)[1])
    assert isinstance(trunk, Trunk)
    assert list(trunk.state_dict()) == [key for key, _ in trunk.named_parameters()]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in trunk.parameters()}
    assert sum(storages.values()) == sum(p.numel() * p.element_size() for p in trunk.parameters())
    widths: list[int] = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        widths.append(len(weight))
        return x @ weight.mT if bias is None else x @ weight.mT + bias

    monkeypatch.setattr(projections.F, "linear", linear)
    cond, times = conditioning(trunk.config, 2), torch.tensor([[900.0, 500.0], [30.0, 1.0]], dtype=torch.float64)
    whole = trunk.prepare(cond, times)
    tables = [table.shape[-1] for table in (whole.time, whole.kv) if table is not None]
    assert [width for width in widths if width in tables] == tables
    for parameter in trunk.parameters():  # as `.to` leaves them: each in a storage of its own
        parameter.data = parameter.data.clone()
    widths.clear()
    apart = trunk.prepare(cond, times)
    assert not set(widths) & set(tables)
    assert error(apart.time, whole.time) <= 1e-13
    assert whole.kv is None or error(apart.kv, whole.kv) <= 1e-13  # type: ignore[arg-type]


def test_only_matrices_that_lie_in_order_are_one() -> None:
    whole = normal("weights", 6, 4)
    a, b, c = whole.split((1, 2, 3))
    found = projections.stacked([a, b, c])
    assert found is not None
    assert torch.equal(found, whole)
    assert found.data_ptr() == whole.data_ptr()
    wrong = [[b, a, c], [a, c], [a, b, whole.clone()[3:]], [a, b.float(), c], [whole[:, :2], whole[:, 2:]]]
    wrong.append([a, b, whole.as_strided((3, 4), (1, 3), 12)])  # columns first
    x = normal("x", 3, 4)
    for weights in wrong:
        assert projections.stacked(weights) is None
    assert error(projections.project(x, wrong[0]), x @ torch.cat(wrong[0]).mT) <= 1e-13


@pytest.mark.parametrize("size", [(3, 5), (4, 4)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0), (5, 1, 2)])
@torch.inference_mode()
def test_convolution_of_few_sites_as_a_gemm(kernel: int, stride: int, padding: int, size: tuple[int, int]) -> None:
    conv = nn.Conv2d(6, 8, kernel, stride, padding).double()
    conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = channels_last(normal("x", 2, 6, *size))
    for bias in (True, False):
        got = convolution.multiply_patches(conv, x, bias)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert error(got, convolution.convolve(conv, x, bias)) <= 1e-13


@pytest.mark.parametrize("name", ["sd15", "adm"])
@torch.inference_mode()
def test_unet_with_every_convolution_as_a_gemm(
    name: str, reference_network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test networks are too small for it by themselves."""
    module, folder = reference_network(f"unet/{name}")
    unet, taken = ours(folder), []
    assert isinstance(unet, UNet)
    multiply = convolution.multiply_patches
    monkeypatch.setattr(convolution, "_few_sites", lambda conv, x: True)
    monkeypatch.setattr(convolution, "multiply_patches", lambda *args: taken.append(args[0]) or multiply(*args))
    assert check(module, unet, (16, 16)) <= GATE
    assert len(taken) > 20


def drop_bias(unet: UNet) -> None:
    """A bias of a feed-forward that was never added."""
    block = unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2")
    assert isinstance(block, nn.Linear)
    block.bias.data.zero_()


def change_epsilon(unet: UNet) -> None:
    """The transformer's group norm with the epsilon of the residual blocks (a float32 gate of 2e-5 misses this)."""
    norm = unet.get_submodule("down_blocks.0.attentions.0.norm")
    assert norm.eps == 1e-6
    norm.eps = 1e-5  # type: ignore[assignment]


def change_layer_norm_epsilon(unet: UNet) -> None:
    """Every layer norm with epsilon 1e-6 instead of 1e-5."""
    for module in unet.modules():
        if isinstance(module, LayerNorm):
            bound = module.op.bound
            module.op.bound = lambda x, w, b, eps, bound=bound: bound(x, w, b, 0.1 * eps)


def swap_skips(unet: UNet) -> None:
    """The lowest up block takes its skips in the wrong order."""
    block = unet.up_blocks[0]
    assert isinstance(block, UpBlock)
    forward = block.forward
    block.forward = lambda x, step, skips: forward(x, step, _swapped(skips))  # type: ignore[method-assign]


def _swapped(skips: list[Tensor]) -> list[Tensor]:
    skips[-1], skips[-2] = skips[-2], skips[-1]
    return skips


def mix_up_time(unet: UNet) -> None:
    """The first and the last residual block read each other's time projection."""
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
    blocks[0].span, blocks[-1].span = blocks[-1].span, blocks[0].span


MUTATIONS = [drop_bias, change_epsilon, change_layer_norm_epsilon, swap_skips, mix_up_time]


@pytest.mark.parametrize("mutate", MUTATIONS)
@torch.inference_mode()
def test_the_gate_catches(mutate: Any, reference_network: Any) -> None:
    module, folder = reference_network("unet/sd15")
    unet = ours(folder)
    assert isinstance(unet, UNet)
    assert check(module, unet, (16, 16)) <= GATE
    mutate(unet)
    assert check(module, unet, (16, 16)) > GATE


@torch.inference_mode()
def test_images_stay_channels_last(reference_network: Any) -> None:
    """No block falls back to another layout, and tokens are a view of the image."""
    unet = ours(reference_network("unet/sd15")[1], dtype=torch.float32)
    assert isinstance(unet, UNet)
    seen = []

    def look(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and not isinstance(module, Site):  # heads, too, are 4-D
            seen.append((type(module).__name__, output.is_contiguous(memory_format=torch.channels_last)))

    for module in unet.modules():
        module.register_forward_hook(look)
    prepared = unet.prepare(conditioning(unet.config, 2), torch.full((2, 1), 500.0))
    unet(normal("latents", 2, 4, 16, 16).float(), prepared, torch.zeros(2, dtype=torch.int64))
    assert len(seen) > 50
    assert [name for name, ok in seen if not ok] == []
    image = channels_last(normal("image", 2, 8, 4, 4))
    assert to_tokens(image).data_ptr() == image.data_ptr()
    assert to_image(to_tokens(image), image).data_ptr() == image.data_ptr()


@torch.inference_mode()
def test_half_precision_stays_close(reference_network: Any) -> None:
    module, folder = reference_network("unet/sdxl")
    unet = ours(folder, dtype=torch.bfloat16)
    assert isinstance(unet, UNet)
    cond, t = conditioning(unet.config, 1), torch.tensor([[500.0]])
    latents = normal("latents", 1, 4, 8, 8)
    got = unet(latents, unet.prepare(cond, t), torch.tensor([0]))
    assert got.dtype == torch.bfloat16
    truth = expected(module, latents, t[0], cond)
    assert float((got.double() - truth).norm() / truth.norm()) < 0.05


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "conditioned on hidden, but none was given"),
        ({"hidden": (1, 7, 32), "pooled": (1, 32)}, "takes no pooled"),
        ({"hidden": (1, 7, 32), "timestep_cond": (1, 16)}, "takes no timestep_cond"),
        ({"hidden": (1, 7, 31)}, "31 wide; this network expects 32"),
    ],
)
def test_wrong_conditioning_is_refused(given: dict[str, tuple[int, ...]], message: str, reference_network: Any) -> None:
    unet = ours(reference_network("unet/sd15")[1])
    assert isinstance(unet, UNet)
    with pytest.raises(RequestError, match=message):
        unet.prepare(Conditioning(**{k: torch.zeros(v) for k, v in given.items()}), torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "'SD3Transformer2DModel' is not a U-Net"),
        (
            {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4},
            r"down_block_types\[0\]='SimpleCrossAttnDownBlock2D'",
        ),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type='UNetMidBlock2DSimpleCrossAttn'"),
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported; supported: 'silu', 'swish'"),
        ({"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ({"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type='image_proj'"),
        ({"norm_num_groups": None}, "norm_num_groups=None"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"attention_head_dim": 7}, "320 channels cannot be split into 7"),
        ({"attention_head_dim": [5, 10]}, "2 entries for 4 levels"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types has 1 entries for 4"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim is missing"),
        ({"transformer_layers_per_block": [[1, 1], 1, 1, 1]}, "reverse_transformer_layers_per_block"),
    ],
)
def test_unknown_structures_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        UNetConfig.from_diffusers(config)


def test_old_and_foreign_spellings_of_a_config(caplog: pytest.LogCaptureFixture) -> None:
    new = UNetConfig.from_diffusers({"_class_name": "UNet2DConditionModel", "attention_head_dim": 8})
    assert UNetConfig.from_diffusers({}) == new
    assert UNetConfig.from_diffusers({"_class_name": "FlaxUNet2DConditionModel", "attention_head_dim": None}) == new
    assert UNetConfig.from_diffusers({"num_attention_heads": 8, "attention_head_dim": 3}) == new
    prefixed = ["UNetResCrossAttnDownBlock2D"] * 3 + ["UNetResDownBlock2D"]
    assert UNetConfig.from_diffusers({"down_block_types": prefixed}) == new
    assert [level.heads for level in new.down] == [8, 8, 8, 1]
    assert not caplog.records
    assert UNetConfig.from_diffusers({"frobnicate": 1}) == new
    assert "ignored unknown configuration entries: frobnicate" in caplog.text


def published(name: str) -> dict[str, Any]:
    """Configurations of published models, where they differ from diffusers' defaults."""
    xl_down, xl_up = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"]
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    return {
        "sd15": {"cross_attention_dim": 768},
        "sd15_inpaint": {"cross_attention_dim": 768, "in_channels": 9},
        "lcm": {"cross_attention_dim": 768, "time_cond_proj_dim": 256},
        "sd21": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        "sdxl": {
            "down_block_types": xl_down,
            "up_block_types": xl_up,
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "projection_class_embeddings_input_dim": 2816,
            **added,
        },
        "refiner": {
            "down_block_types": [*xl_down, "DownBlock2D"],
            "up_block_types": ["UpBlock2D", *xl_up],
            "block_out_channels": [384, 768, 1536, 1536],
            "cross_attention_dim": 1280,
            "transformer_layers_per_block": 4,
            "attention_head_dim": [6, 12, 24, 24],
            "projection_class_embeddings_input_dim": 2560,
            **added,
        },
        "ldm_sr": {
            "_class_name": "UNet2DModel",
            "in_channels": 6,
            "block_out_channels": [160, 320, 320, 640],
            "down_block_types": ["DownBlock2D"] * 3 + ["AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * 3,
            "attention_head_dim": 32,
        },
    }[name]


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("sd15", 859_520_964, 686),
        ("sd15_inpaint", 859_535_364, 686),
        ("lcm", 859_602_884, 687),
        ("sd21", 865_910_724, 686),
        ("sdxl", 2_567_463_684, 1680),
        ("refiner", 2_259_526_660, 1220),
        ("ldm_sr", 113_622_563, 330),
    ],
)
def test_published_sizes(name: str, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_diffusers(published(name)))
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert len(unet.state_dict()) == tensors


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@torch.inference_mode()
def test_an_update_reads_no_value_on_the_host(name: str) -> None:
    """A full-size network runs on the meta device, where any look at a value raises, and keeps its shapes."""
    config = UNetConfig.from_diffusers(published(name))
    rows, xl = 3, name == "sdxl"
    with torch.device("meta"):
        unet = UNet(config).half()
        cond = Conditioning(
            hidden=torch.empty(rows, 77, config.blocks.cross_dim or 0),
            pooled=torch.empty(rows, 1280) if xl else None,
            time_ids=torch.empty(rows, 6) if xl else None,
            kv_len=torch.empty(rows, dtype=torch.int32),
        )
        prepared = unet.prepare(cond, torch.empty(rows, 30))
        out = unet(torch.empty(rows, 4, 64, 96), prepared, torch.empty(rows, dtype=torch.int64))
    assert out.shape == (rows, 4, 64, 96)
    assert out.dtype == torch.float16
    assert prepared.kv is not None
    kv_per_row = prepared.kv[0].numel() * 2
    assert kv_per_row == {"sd15": 77 * 2 * 2 * 12_480, "sdxl": 77 * 2 * 2 * (10 * 640 + 60 * 1280)}[name]


def test_an_update_traces_without_breaks(reference_network: Any) -> None:
    """torch.export sees one graph, whatever the rows' updates are."""
    unet = ours(reference_network("unet/sd15")[1], dtype=torch.float32)
    assert isinstance(unet, UNet)
    prepared = unet.prepare(conditioning(unet.config, 2), torch.tensor([[900.0, 400.0], [800.0, 1.0]]))
    assert prepared.kv is not None

    class Update(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, latents: Tensor, time: Tensor, kv: Tensor, update: Tensor) -> Tensor:
            return self.unet(latents, Prepared(time=time, kv=kv), update)

    latents = normal("latents", 2, 4, 16, 16).float()
    args = (latents, prepared.time, prepared.kv, torch.tensor([0, 1]))
    program = torch.export.export(Update(), args)
    swapped = torch.tensor([1, 0])
    got = program.module()(latents, prepared.time, prepared.kv, swapped)
    assert error(got, unet(latents, prepared, swapped)) <= 1e-5
