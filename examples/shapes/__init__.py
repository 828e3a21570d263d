"""Training and evaluation of the built-in model `shapes`: a latent diffusion model of captioned geometric scenes."""
