"""The op `attention` and its implementations, in the order in which `auto` tries them where no record decides.

Libraries first: cuDNN is the fastest of torch's kernels on Hopper. The chunked form takes the heads no flash kernel
takes, the Triton kernel the key lengths that torch's kernels do not know.
"""

from ..device import has_triton
from ..op import define
from . import chunked, vendor
from .cases import CASES
from .reference import attention as reference

attention = define(rows=("q", "k", "v", "kv_len", "bias"), cases=CASES)(reference)

attention.implement("vendor:flash_attn", vendor.flash_attn_unsupported)(vendor.flash_attn)
attention.implement("vendor:cudnn", vendor.cudnn_unsupported)(vendor.cudnn)
attention.implement("vendor:flash", vendor.flash_unsupported)(vendor.flash)
attention.implement("chunked", chunked.unsupported)(chunked.attention)
attention.implement("vendor:efficient", vendor.efficient_unsupported)(vendor.efficient)

if has_triton():
    from .kernel import attention as triton_attention
    from .kernel import unsupported

    attention.implement("triton", unsupported)(triton_attention)

attention.implement("vendor:xformers", vendor.xformers_unsupported)(vendor.xformers)
