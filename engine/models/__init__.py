"""Our own graphs of the networks, built on `layers.py`; parameter names follow diffusers."""
