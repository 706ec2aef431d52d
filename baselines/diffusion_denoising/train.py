"""Train the diffusion model once for all sigmas (`--sigma 0` names no noise level)."""

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Generator, Tensor

from baselines.command import BaselineJob, run_baseline
from baselines.diffusion_denoising.denoiser import build_unet, ddpm_scheduler
from baselines.diffusion_denoising.settings import DiffusionSettings
from bench.cost import training_flops
from bench.files import atomic_write, write_json
from bench.training import BatchLoss, fit

EMA_DECAY = 0.995


def noise_prediction(unet: UNet2DModel, settings: DiffusionSettings) -> BatchLoss:
    """The simple DDPM loss (Ho 2020, eq. 14) with t uniform in the settings' window."""
    scheduler = ddpm_scheduler()

    def loss(images: Tensor, labels: Tensor, generator: Generator, progress: float) -> Tensor:
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        window = (settings.timesteps_low, settings.timesteps_high)
        t = torch.randint(*window, (len(images),), generator=generator, device=images.device)
        noisy = scheduler.add_noise(2 * images - 1, noise, t)
        return F.mse_loss(unet(noisy, t).sample, noise)

    return loss


def train_unet(job: BaselineJob) -> None:
    """Train the UNet and write its averaged weights in diffusers' format, and `cost.json`."""
    settings = job.settings_as(DiffusionSettings)
    channels, size = job.data.shape[:2]
    unet = build_unet(channels, size, settings.stage_channels, settings.layers_per_block)
    unet.to(job.device)
    average = EMAModel(unet.parameters(), decay=EMA_DECAY, use_ema_warmup=True, power=0.75)
    loss = noise_prediction(unet, settings)
    flops = training_flops(loss, job.data.shape, job.training.images, unet)
    record = fit(
        unet,
        loss,
        job.data.train,
        job.training,
        job.learning_rate,
        job.seed,
        after_step=lambda: average.step(unet.parameters()),
    )
    average.copy_to(unet.parameters())
    unet.save_pretrained(job.output)
    ddpm_scheduler().save_pretrained(job.output)
    with atomic_write(job.output / "loss.txt") as temporary:
        temporary.write_text("".join(f"{step} {value}\n" for step, value in record.loss_curve))
    write_json(
        job.output / "cost.json",
        {
            "training_flops": flops,
            "trainable_parameters": sum(p.numel() for p in unet.parameters()),
            "training_images": record.images,
            "training_seconds": record.seconds,
            "peak_memory_bytes": record.peak_memory_bytes,
            "fingerprint": job.identity.fingerprint,
        },
    )


if __name__ == "__main__":
    run_baseline(train_unet)
