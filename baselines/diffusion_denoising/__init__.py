"""Diffusion-denoised smoothing (Carlini et al. 2023): one denoising step of a diffusion model."""
