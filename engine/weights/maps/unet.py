"""U-Nets and ControlNets: our names are diffusers'; the projections around transformers may be 1x1 convolutions."""

from ..keymap import KeyMap
from .attention import FLAT_ATTENTION, OLD_ATTENTION

UNET = KeyMap(rules=OLD_ATTENTION, flatten=(r"attentions\.\d+\.proj_(in|out)\.weight$", *FLAT_ATTENTION))
