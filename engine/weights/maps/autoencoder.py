"""Autoencoders: our names are diffusers'."""

from ..keymap import KeyMap
from .attention import FLAT_ATTENTION, OLD_ATTENTION

AUTOENCODER = KeyMap(rules=OLD_ATTENTION, flatten=FLAT_ATTENTION)
