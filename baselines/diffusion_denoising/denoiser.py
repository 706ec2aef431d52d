"""A diffusion model as a module from noisy to clean pixels, in one step or several."""

from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from bench.errors import BenchError

# Of the reverse process; it is part of the classifier, no part of the smoothing noise.
INNER_SEED = 20_230_613


def ddpm_scheduler() -> DDPMScheduler:
    """The linear schedule of DDPM (Ho 2020), as in google/ddpm-cifar10-32."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")


def entry_point(abar: Tensor, sigma: float, rule: str) -> tuple[float, float]:
    """Time step at which images with noise `sigma` enter the reverse process, and its abar.

    The noise level of step t is sqrt((1 - abar_t) / abar_t) (Carlini 2023, section 3). It must be
    2 sigma, since the diffusion model lives in [-1, 1] and sigma is in [0, 1] pixels.

    Args:
        abar: of all time steps, `(T,)`.
        sigma: noise level in [0, 1] pixels.
        rule: `carlini`, the first t >= 1 that is noisy enough; `matched`, the t between two steps
            whose level is 2 sigma exactly.

    Raises:
        BenchError: no step of the schedule is that noisy.
    """
    levels = ((1 - abar.double()) / abar.double()).sqrt()
    target = torch.tensor(2 * sigma, dtype=torch.float64)
    if target > levels[-1]:
        raise BenchError(f"sigmas: {sigma} exceeds the highest noise level of the diffusion model")
    first = max(1, int(torch.searchsorted(levels, target)))
    if rule == "carlini":
        return float(first), float(abar[first])
    below, above = levels[first - 1].log(), levels[first].log()
    share = float((target.log() - below) / (above - below))
    return first - 1 + max(0.0, share), float(1 / (1 + target**2))


def time_steps(abar: Tensor, sigma: float, rule: str, steps: int) -> list[tuple[float, float]]:
    """(t, abar_t) of each denoising step: the entry point, then evenly down towards t = 0.

    Raises:
        BenchError: there are fewer time steps than `steps`.
    """
    start, level = entry_point(abar, sigma, rule)
    later = [round(start * (1 - step / steps)) for step in range(1, steps)]
    if len({int(start), *later}) < steps:
        raise BenchError(f"settings.steps = {steps}: only {int(start)} lie below sigma = {sigma}")
    return [(start, level), *((float(t), float(abar[t])) for t in later)]


def unet_config(
    channels: int, size: int, stage_channels: list[int], layers_per_block: int
) -> dict[str, Any]:
    """Configuration of a UNet without attention whose stages halve the resolution."""
    stages = len(stage_channels)
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": stage_channels,
        "layers_per_block": layers_per_block,
        "down_block_types": ["DownBlock2D"] * stages,
        "up_block_types": ["UpBlock2D"] * stages,
        "norm_num_groups": min(8, *stage_channels),
        "add_attention": False,
    }


class DiffusionDenoiser(nn.Module):
    """x0 estimate of a noise-predicting UNet, entered at the time step that `sigma` asks for.

    Further steps sample the reverse process with noise that is fixed once for all images and
    kept with the weights: the classifier stays a function of its input, so certificates hold
    without an argument about inner randomness.
    """

    inner_noise: Tensor

    def __init__(
        self,
        sigma: float,
        unet: dict[str, Any],
        scheduler: dict[str, Any],
        timestep: str = "carlini",
        steps: int = 1,
        votes: int = 1,
    ):
        super().__init__()
        self.unet = UNet2DModel.from_config(unet)
        abar = DDPMScheduler.from_config(scheduler).alphas_cumprod
        self.times = time_steps(abar, sigma, timestep, steps)
        if steps > 1:
            size, generator = unet["sample_size"], torch.Generator().manual_seed(INNER_SEED)
            shape = (votes, steps - 1, unet["in_channels"], size, size)
            self.register_buffer("inner_noise", torch.randn(shape, generator=generator))

    def forward(self, noisy: Tensor) -> Tensor:
        """Denoised pixels `(B, C, H, W)` in [0, 1], or V of them, `(V, B, C, H, W)`."""
        entered = (2 * noisy - 1) * self.times[0][1] ** 0.5
        first = self._estimate(entered, 0)
        if len(self.times) == 1:
            return (first + 1) / 2
        candidates = []
        for noises in self.inner_noise:
            x_t, x_0 = entered, first
            for step, noise in enumerate(noises, start=1):
                x_t = self._descend(x_t, x_0, step, noise)
                x_0 = self._estimate(x_t, step)
            candidates.append((x_0 + 1) / 2)
        return torch.stack(candidates) if len(candidates) > 1 else candidates[0]

    def _estimate(self, x_t: Tensor, step: int) -> Tensor:
        """The clean image in [-1, 1] that the UNet sees in `x_t`."""
        t, abar = self.times[step]
        noise = self.unet(x_t, torch.tensor(t, device=x_t.device)).sample
        x_0: Tensor = (x_t - (1 - abar) ** 0.5 * noise) / abar**0.5
        return x_0.clamp(-1, 1)

    def _descend(self, x_t: Tensor, x_0: Tensor, step: int, noise: Tensor) -> Tensor:
        """A sample of the next, less noisy state given x_t and x_0 (DDIM, eq. 12, eta = 1).

        Between neighbouring time steps this is the posterior of DDPM (Ho 2020, eq. 7).
        """
        before, after = self.times[step - 1][1], self.times[step][1]
        variance = (1 - after) / (1 - before) * (1 - before / after)
        towards = (x_t - before**0.5 * x_0) / (1 - before) ** 0.5
        mean = after**0.5 * x_0 + (1 - after - variance) ** 0.5 * towards
        return mean + variance**0.5 * noise
