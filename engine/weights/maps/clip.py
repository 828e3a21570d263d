"""CLIP text encoders of transformers: the prefix `text_model.` comes and goes with its versions (flattened in 5.6)."""

from ..keymap import KeyMap, Rule

CLIP = KeyMap(
    rules=(Rule(r"^text_model\.", ""), Rule(r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1.")),
    ignore=(r"(^|\.)embeddings\.position_ids$",),  # 0..76, stored by transformers before 4.31
)
