"""Conditioning: what a prompt, an image or a label becomes before the denoiser sees it."""
