"""Upscalers without diffusion: Lanczos, and feed-forward networks such as Real-ESRGAN or SwinIR."""
