"""Spellings of the self-attention over images that diffusers used before 0.15."""

from ..keymap import Rule

OLD_ATTENTION = (
    Rule(r"(attentions\.\d+)\.query\.", r"\1.to_q."),
    Rule(r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    Rule(r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    Rule(r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
# The same matrices also occur as 1x1 convolutions.
FLAT_ATTENTION = (r"attentions\.\d+\.to_(q|k|v|out\.0)\.weight$",)
