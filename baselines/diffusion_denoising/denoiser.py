"""One denoising step of a diffusion model, as a module from noisy to clean pixels."""

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn


def ddpm_scheduler() -> DDPMScheduler:
    """The linear schedule of DDPM (Ho 2020), as in google/ddpm-cifar10-32."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")


def matched_timestep(sigma: float) -> int:
    """First t with sqrt((1 - abar_t) / abar_t) >= 2 sigma (Carlini 2023, section 3).

    2 sigma, since the diffusion model lives in [-1, 1] and sigma is in [0, 1] pixels.

    Raises:
        ValueError: no step of the schedule is that noisy.
    """
    abar = ddpm_scheduler().alphas_cumprod.double()
    levels = ((1 - abar) / abar).sqrt()
    if 2 * sigma > float(levels[-1]):
        raise ValueError(f"sigma = {sigma} exceeds the schedule's highest noise level")
    return int(torch.searchsorted(levels, 2 * sigma))


def build_unet(
    channels: int, size: int, stage_channels: list[int], layers_per_block: int
) -> UNet2DModel:
    """A UNet without attention whose stages halve the resolution."""
    stages = len(stage_channels)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(stage_channels),
        layers_per_block=layers_per_block,
        down_block_types=("DownBlock2D",) * stages,
        up_block_types=("UpBlock2D",) * stages,
        norm_num_groups=min(8, *stage_channels),
        add_attention=False,
    )


class OneStepDenoiser(nn.Module):
    """x0 estimate of a noise-predicting UNet at the time step matched to `sigma`."""

    def __init__(
        self,
        sigma: float,
        channels: int,
        size: int,
        stage_channels: list[int],
        layers_per_block: int,
    ):
        super().__init__()
        self.unet = build_unet(channels, size, stage_channels, layers_per_block)
        self.timestep = matched_timestep(sigma)
        self.abar = float(ddpm_scheduler().alphas_cumprod[self.timestep])

    def forward(self, noisy: Tensor) -> Tensor:
        """Denoised pixels `(B, C, H, W)` in [0, 1]."""
        x_t = (2 * noisy - 1) * self.abar**0.5
        noise = self.unet(x_t, self.timestep).sample
        x_0 = (x_t - (1 - self.abar) ** 0.5 * noise) / self.abar**0.5
        clean: Tensor = (x_0.clamp(-1, 1) + 1) / 2
        return clean
