"""Torch reference of `attention`: the definition of the op."""

import torch
import torch.nn.functional as F


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale + bias) v, without causal mask (Vaswani et al. 2017, eq. 1).

    q: [B, Lq, H, D]; k, v: [B, Lk, H, D]; all of one floating dtype, any strides.
    kv_len: int32 [B], keys at positions >= kv_len are ignored (None = all Lk). At least one key per row.
    bias: added to the scores, broadcastable to [B, H, Lq, Lk]. scale: default 1/sqrt(D).
    Returns [B, Lq, H, D], contiguous.
    """
    mask = bias
    if kv_len is not None:
        seen = torch.arange(k.shape[1], device=k.device) < kv_len[:, None]  # [B, Lk]
        hidden = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, float("-inf"))
        mask = hidden[:, None, None] if bias is None else bias + hidden[:, None, None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2).contiguous()
