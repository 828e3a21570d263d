"""Contract cases of `attention`: real head dims at reduced lengths, masks, tails, broadcast biases."""

import torch

from ..op import Case, Spec


def _qkv(rows: int, lq: int, lk: int, heads: int, dim: int, **extra: object) -> dict[str, object]:
    return {"q": (rows, lq, heads, dim), "k": (rows, lk, heads, dim), "v": (rows, lk, heads, dim), **extra}


CASES = (
    Case("sd15 self, head dim 40", _qkv(2, 64, 64, 8, 40)),
    Case("sd15 cross, head dim 80", _qkv(2, 33, 77, 2, 80)),
    Case("sd15 low, head dim 160", _qkv(2, 16, 77, 2, 160)),
    Case("sdxl self, head dim 64", _qkv(2, 65, 65, 2, 64)),
    Case("vae mid block, head dim 512", _qkv(1, 49, 49, 1, 512)),
    Case("key padding", _qkv(3, 17, 24, 2, 32, kv_len=Spec((3,), torch.int32, 1, 25))),
    Case("additive bias", _qkv(2, 9, 13, 3, 32, bias=(2, 1, 9, 13))),
    Case(
        "padding, bias and scale",
        _qkv(2, 5, 7, 1, 16, kv_len=Spec((2,), torch.int32, 1, 8), bias=(2, 1, 1, 7), scale=0.3),
    ),
    Case("one query, one key", _qkv(2, 1, 1, 1, 8)),
)
