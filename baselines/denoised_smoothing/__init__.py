"""Denoised smoothing (Salman et al. 2020): a trained CNN denoiser before a frozen classifier."""
