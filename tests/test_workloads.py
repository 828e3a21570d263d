"""The shapes that the GPU suite times are those of the published graphs."""

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode

from stepfuse.benchmarks.gpu_parts.workloads import MODELS, Attention, Conv, Gemm, counted, flops

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
}


class Recorder(TorchFunctionMode):
    """Notes the shapes of every linear, convolution and attention of two rows."""

    def __init__(self):
        super().__init__()
        self.sites = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "linear":
            x, weight = args[:2]
            per_row = x.dim() == 3
            self.sites[Gemm(x.shape[1] if per_row else 1, weight.shape[0], weight.shape[1], per_row)] += 1
        elif name == "conv2d":
            x, weight = args[:2]
            stride = args[3] if len(args) > 3 else kwargs.get("stride", 1)
            stride = stride[0] if isinstance(stride, tuple) else stride
            self.sites[Conv(x.shape[1], weight.shape[0], weight.shape[2], stride, x.shape[2])] += 1
        elif name == "scaled_dot_product_attention":
            q, k = args[0] if args else kwargs["query"], args[1] if len(args) > 1 else kwargs["key"]
            self.sites[Attention(q.shape[1], q.shape[3], q.shape[2], k.shape[2])] += 1
        return func(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "config", "context"), [("sd15", SD15, 768), ("sdxl", SDXL, 2048)])
def test_unet_sites_equal_the_published_graph(model, config, context):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
        size = unet.config.sample_size
        inputs = torch.empty(2, 4, size, size), torch.empty(2), torch.empty(2, 77, context)
        with Recorder() as recorder:
            unet(*inputs)
    ours = Counter()
    for site, count in Counter(MODELS[model].sites()).items():
        plain = Conv(site.c_in, site.c_out, site.kernel, site.stride, site.size) if isinstance(site, Conv) else site
        ours[plain] += count
    assert ours == recorder.sites
    assert sum(ours.values()) > 200


def test_flops_of_known_models():
    """SD 1.5 at 512 x 512 takes about 0.80 TFLOP per row, SDXL at 1024 x 1024 about 6.76 (multiply-add counts two)."""
    totals = {
        model: sum(
            flops(site) * count for kind in (Gemm, Conv, Attention) for site, count in counted(model, kind).items()
        )
        for model in ("sd15", "sdxl")
    }
    assert totals["sd15"] == pytest.approx(0.803e12, rel=0.002)
    assert totals["sdxl"] == pytest.approx(6.761e12, rel=0.001)
