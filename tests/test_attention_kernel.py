"""Attention: the Triton kernel under the interpreter, the chunked form, and which calls each implementation refuses.

A kernel's error against float64 may be twice that of torch in the same dtype, plus 1e-7 of the largest value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.runtime import interpreter

from stepfuse import kernels
from stepfuse.kernels.attention import kernel as triton_kernel
from stepfuse.kernels.attention import vendor
from stepfuse.kernels.attention.chunked import chunked
from stepfuse.kernels.attention.config import MAX_HEAD_DIM, Config, heuristic, parts, search_space
from stepfuse.kernels.attention.kernel import TARGETS, run
from stepfuse.kernels.launch import Options
from stepfuse.kernels.op import Call, TensorInfo, UnsupportedCallError
from stepfuse.kernels.policy import policy

Tensor = torch.Tensor
attention = kernels.attention
IMPLEMENTATIONS = attention.implementations
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Config(16, 16, Options(num_warps=4, num_stages=1))
interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 and a process of its own"
)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def qkv(rows: int, lq: int, lk: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return tensors((rows, lq, heads, dim), (rows, lk, heads, dim), (rows, lk, heads, dim), dtype=dtype)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def check(found: Tensor, q: Tensor, k: Tensor, v: Tensor, **extra: object) -> None:
    """`found` is within the tolerance rule, contiguous, and has q's shape and dtype."""

    def wide(x: object) -> object:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    truth = attention.reference(q.double(), k.double(), v.double(), **{n: wide(x) for n, x in extra.items()})
    torch_error = (attention.reference(q, k, v, **extra).double() - truth).abs().max()
    error = (found.double() - truth).abs().max()
    assert found.dtype == q.dtype
    assert found.shape == q.shape
    assert found.is_contiguous()
    assert error <= 2 * torch_error + 1e-7 * truth.abs().max(), f"{error:.3g}, torch {torch_error:.3g}"


@interpreted
@pytest.mark.interpret
class TestInterpreted:
    @pytest.fixture(autouse=True)
    def _bfloat16_as_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Triton's interpreter (to 3.7.1) multiplies bfloat16 as the uint16 that hold it, and truncates to bfloat16."""
        dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

        def wide(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
            if x.dtype.scalar != tl.bfloat16:
                return x
            return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        def rounded(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
            if (source, target) != (tl.float32, tl.bfloat16):
                return convert(data, source, target, mode)
            halves = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).to(torch.bfloat16)
            return halves.view(torch.int16).numpy().view(np.uint16)

        monkeypatch.setattr(interpreter, "_convert_float", rounded)
        monkeypatch.setattr(
            interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dim", [8, 40, 64, 72, 80, 112, 128, 160, 192])
    def test_every_head_dim(self, dim: int, dtype: torch.dtype) -> None:
        q, k, v = qkv(2, 19, 33, 2, dim, dtype)
        check(IMPLEMENTATIONS["triton"].call(q, k, v), q, k, v)

    @pytest.mark.parametrize(("lq", "lk"), [(1, 1), (16, 16), (17, 31), (15, 32), (33, 1), (7, 77), (130, 129)])
    def test_lengths_around_the_tiles(self, lq: int, lk: int) -> None:
        q, k, v = qkv(1, lq, lk, 2, 40)
        check(run(q, k, v, None, None, None, SMALL), q, k, v)

    @pytest.mark.parametrize("sm", sorted(TARGETS.values()))
    def test_the_tiles_of_every_architecture(self, sm: int) -> None:
        q, k, v = qkv(1, 70, 131, 1, 80, torch.bfloat16)
        bias = tensors((1, 1, 70, 131), dtype=torch.bfloat16)[0]
        for config in {heuristic(80, n, n, 16, sm, biased) for n in (64, 4096) for biased in (False, True)}:
            check(run(q, k, v, None, bias, None, config), q, k, v, bias=bias)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_prompt_of_77_with_key_lengths(self, dtype: torch.dtype) -> None:
        q, k, v = qkv(4, 20, 77, 2, 40, dtype)
        kv_len = lengths(1, 77, 16, 50)
        check(IMPLEMENTATIONS["triton"].call(q, k, v, kv_len), q, k, v, kv_len=kv_len)

    @pytest.mark.parametrize("shape", [(2, 3, 21, 37), (2, 1, 1, 37), (1, 3, 21, 1), (21, 37), (37,), (1,)], ids=str)
    def test_a_bias_broadcasts(self, shape: tuple[int, ...]) -> None:
        q, k, v = qkv(2, 21, 37, 3, 16)
        bias = tensors(shape, seed=1)[0]
        kv_len = lengths(5, 37)
        found = run(q, k, v, kv_len, bias, 0.3, SMALL)
        if len(shape) == 4:  # what torch's reference accepts beside key lengths
            check(found, q, k, v, kv_len=kv_len, bias=bias, scale=0.3)
        else:
            check(found, q, k, v, kv_len=kv_len, bias=bias.expand(2, 3, 21, 37), scale=0.3)

    def test_a_bias_of_minus_infinity_hides_the_first_keys(self) -> None:
        q, k, v = qkv(1, 5, 50, 1, 16)
        bias = torch.zeros(1, 1, 1, 50)
        bias[..., :40] = float("-inf")
        check(run(q, k, v, None, bias, None, SMALL), q, k, v, bias=bias)

    def test_large_scores_do_not_overflow(self) -> None:
        q, k, v = qkv(1, 9, 40, 1, 32)
        check(run(q, k, v, None, None, 30.0, SMALL), q, k, v, scale=30.0)

    @pytest.mark.parametrize("dim", [40, 33])
    def test_any_strides_and_none_are_changed(self, dim: int) -> None:
        packed = tensors((2, 3, 18, 3, dim))[0]  # [B, 3, L, H, D] in memory
        q, k, v = packed.unbind(1)
        before = packed.clone()
        check(run(q, k, v, None, None, None, SMALL), q, k, v)
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))  # [B, H, L, D] in memory
        check(run(q, k, v, None, None, None, SMALL), q, k, v)
        q, k, v = (t.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1) for t in (q, k, v))  # D is not last
        check(run(q, k, v, None, None, None, SMALL), q, k, v)
        assert torch.equal(packed, before)

    def test_what_surrounds_the_tensors_is_not_read_and_all_of_the_output_is_written(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        q, k, v = qkv(2, 18, 21, 2, 40)
        big = [torch.full((2, 40, 2, 50), float("nan")) for _ in range(3)]
        views = [b[:, 7 : 7 + t.shape[1], :, 4:44].copy_(t) for b, t in zip(big, (q, k, v), strict=True)]
        kv_len = lengths(20, 3)
        for tensor, view in zip((k, v), views[1:], strict=True):  # what lies beyond a row's length is not read either
            tensor[1, 3:], view[1, 3:] = 0.0, float("nan")
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(float("nan")))
        found = run(views[0], views[1], views[2], kv_len, None, None, SMALL)
        monkeypatch.undo()
        assert found.isfinite().all()
        check(found, q, k, v, kv_len=kv_len)

    def test_rows_do_not_depend_on_each_other_and_runs_repeat(self) -> None:
        q, k, v = qkv(3, 17, 24, 2, 72)
        kv_len = lengths(24, 9, 1)
        whole = run(q, k, v, kv_len, None, None, SMALL)
        assert torch.equal(whole, run(q, k, v, kv_len, None, None, SMALL))
        for r in range(3):
            one = slice(r, r + 1)
            assert torch.equal(run(q[one], k[one], v[one], kv_len[one], None, None, SMALL)[0], whole[r])

    @pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7)])
    def test_nothing_in_nothing_out(self, shape: tuple[int, int, int]) -> None:
        q, k, v = qkv(*shape, 2, 16)
        assert run(q, k, v, None, None, None, SMALL).shape == q.shape

    def test_a_row_without_keys_is_zero(self) -> None:
        q, k, v = qkv(2, 3, 5, 1, 16)
        found = run(q, k, v, lengths(0, 5), None, None, SMALL)
        assert torch.equal(found[0], torch.zeros(3, 1, 16))
        check(found[1:], q[1:], k[1:], v[1:])


class TestChunked:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("workspace", [1, 40_000, 1 << 30])
    def test_any_workspace_gives_the_same_values(self, workspace: int, dtype: torch.dtype) -> None:
        q, k, v = qkv(2, 37, 41, 2, 512, dtype)
        check(chunked(q, k, v, None, None, None, workspace), q, k, v)

    def test_lengths_bias_and_scale(self) -> None:
        q, k, v = qkv(3, 11, 13, 2, 320)
        extra = {"kv_len": lengths(1, 13, 6), "bias": tensors((3, 1, 11, 13), seed=1)[0], "scale": 0.3}
        check(chunked(q, k, v, *extra.values(), 9000), q, k, v, **extra)

    def test_the_workspace_bounds_the_scores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        q, k, v = qkv(1, 64, 64, 1, 272)
        seen: list[int] = []
        softmax = torch.softmax
        monkeypatch.setattr(torch, "softmax", lambda x, dim: seen.append(x.numel()) or softmax(x, dim))
        limit = 8 * 64 * 12
        check(chunked(q, k, v, None, None, None, limit), q, k, v)
        assert seen == [8 * 64] * 8  # 8 queries at a time, 12 bytes a score

    def test_an_empty_batch(self) -> None:
        q, k, v = qkv(0, 5, 7, 1, 512)
        assert chunked(q, k, v, None, None, None, 1 << 20).shape == q.shape
        q, k, v = qkv(2, 0, 7, 1, 512)
        assert chunked(q, k, v, None, None, None, 1 << 20).shape == q.shape

    def test_by_name_on_a_cpu(self) -> None:
        q, k, v = qkv(1, 9, 9, 1, 512)
        with policy({"attention": "chunked"}):
            check(attention(q, k, v), q, k, v)
            with pytest.raises(UnsupportedCallError, match="above 256, got 64"):
                attention(*qkv(1, 9, 9, 1, 64))


def call(
    dim: int = 64, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", lk: int = 77, **extra: object
) -> Call:
    """The signature of a call; extra: shapes of kv_len and bias, or the scale."""
    found = {n: TensorInfo((2, lk if n in "kv" else 64, 8, dim), dtype) for n in "qkv"}
    found |= {n: TensorInfo(x, torch.int32 if n == "kv_len" else dtype) for n, x in extra.items() if n != "scale"}
    return Call(device, found, {"scale": extra.get("scale")})


REFUSALS = [
    ("vendor:cudnn", 90, call(160), None),
    ("vendor:cudnn", 120, call(160), "at most 128"),
    ("vendor:cudnn", 90, call(512), "at most 256"),
    ("vendor:cudnn", 90, call(dtype=torch.float32), "float16, bfloat16"),
    ("vendor:cudnn", 90, call(44), "multiple of 8"),
    ("vendor:cudnn", 90, call(kv_len=(2,)), "kv_len"),
    ("vendor:cudnn", 90, call(bias=(2, 1, 1, 77)), None),
    ("vendor:cudnn", 90, call(lk=1), "one key"),
    ("vendor:cudnn", 75, call(), "capability 8.0, the device has 7.5"),
    ("vendor:flash", 120, call(256), None),
    ("vendor:flash", 90, call(bias=(2, 1, 1, 77)), "additive bias"),
    ("vendor:flash", 90, call(kv_len=(2,)), "kv_len"),
    ("vendor:efficient", 90, call(512, torch.float32), None),
    ("vendor:efficient", 90, call(kv_len=(2,)), "kv_len"),
    ("vendor:efficient", 90, call(44), "multiple of 8"),
    ("vendor:efficient", 90, call(44, torch.float32), None),
    ("vendor:efficient", 90, call(lk=0), "empty"),
    ("triton", 90, call(MAX_HEAD_DIM, torch.float32, kv_len=(2,)), None),
    ("triton", 90, call(MAX_HEAD_DIM + 1), "1 to 192"),
    ("triton", 90, call(scale=-1.0), "positive"),
    ("triton", 90, call(dtype=torch.float64), "float16, bfloat16 and float32"),
    ("triton", 75, call(), "capability 8.0"),
    ("chunked", 90, call(512), None),
    ("chunked", 90, call(256), "above 256"),
]


@pytest.mark.parametrize(("name", "sm", "made", "text"), REFUSALS)
def test_refusals(name: str, sm: int, made: Call, text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor, "sm", lambda: sm)
    monkeypatch.setattr(triton_kernel, "sm", lambda: sm)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    reason = IMPLEMENTATIONS[name].unsupported(made)
    assert reason is None if text is None else text in str(reason)


def test_what_is_not_installed_or_not_on_a_gpu_says_so() -> None:
    for name in ("vendor:cudnn", "vendor:flash", "vendor:efficient"):
        assert "needs a CUDA device, the tensors are on cpu" in str(
            IMPLEMENTATIONS[name].unsupported(call(device="cpu"))
        )
    for name, library in (("vendor:xformers", "xformers"), ("vendor:flash_attn", "flash_attn")):
        if vendor.find_spec(library) is None:
            assert "installed" in str(IMPLEMENTATIONS[name].unsupported(call()))
    for name, implementation in IMPLEMENTATIONS.items():
        if name != "reference":
            assert "forward only" in str(implementation.unsupported(replace(call(512), requires_grad=True))) or (
                "installed" in str(implementation.unsupported(call(512)))
            )


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter does not trace")
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("vendor:cudnn", "_scaled_dot_product_cudnn_attention"),
        ("vendor:efficient", "_scaled_dot_product_efficient_attention"),
        ("vendor:flash", "_scaled_dot_product_flash_attention"),
        ("vendor:xformers", "attention_xformers"),
        ("vendor:flash_attn", "attention_flash_attn"),
    ],
)
def test_traces_have_one_kernel_and_no_copy(name: str, target: str) -> None:
    """What torch.compile sees on a GPU, from fake tensors: the kernel itself, and no copy of q, k, v."""
    nodes = trace(IMPLEMENTATIONS[name].call)
    assert sum(target in n for n in nodes) == 1, nodes
    assert not [n for n in nodes if "clone" in n or "copy" in n or "pad" in n], nodes


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter does not trace")
def test_the_triton_launch_traces_to_one_kernel() -> None:
    nodes = trace(IMPLEMENTATIONS["triton"].call)
    assert nodes == ["stepfuse.attention_triton.default"]
    config = heuristic(40, 64, 16, 16, 90)
    nodes = trace(lambda q, k, v: run(q, k, v, None, None, None, config))
    assert nodes == ["aten.empty.memory_format", "triton_kernel_wrapper_mutation"]


def trace(function: Callable[..., Tensor]) -> list[str]:
    """The operators of a trace with fake CUDA tensors q [2, 64, 8, 40], k, v [2, 77, 8, 40]."""
    with FakeTensorMode():
        q, k, v = (torch.empty(2, n, 8, 40, dtype=torch.bfloat16, device="cuda") for n in (64, 77, 77))
        graph = make_fx(lambda q, k, v: function(q, k, v))(q, k, v).graph
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def test_parts_cover_every_head_dim_with_less_than_16_to_spare() -> None:
    for dim in range(1, MAX_HEAD_DIM + 1):
        cut = parts(dim)
        assert dim <= sum(cut) < dim + 16
        assert set(cut) <= {0, 16, 32, 64, 128}
        assert list(cut) == sorted(cut, reverse=True), "empty parts come last"


def test_configurations() -> None:
    with pytest.raises(ValueError, match=r"193.*1 to 192"):
        parts(193)
    for sm in TARGETS.values():
        few, many = (heuristic(64, 4096, heads, 16, sm) for heads in (1, 320))
        assert few.block_m <= many.block_m
    assert heuristic(80, 4096, 16, 16, 90) == Config(128, 128, Options(8, 3))
    assert heuristic(80, 4096, 16, 16, 90) in search_space(80, 4096, 16)
    assert all(c.block_m == 64 for c in search_space(64, 64, 16))
