"""Stable Diffusion 1, 2 and XL: UNet, VAE, text encoders and noise schedule over borrowed tensors."""
