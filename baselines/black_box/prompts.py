"""What stands in front of the black box and adds a prompt to the noisy image."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLURS = (0.6, 0.9, 1.3, 2.0)
WINDOWS = (3, 5, 7)
FILTERS = [*(f"blur {std}" for std in BLURS), *(f"Wiener {side}" for side in WINDOWS)]
SMALLEST = 1e-4


class ConstantPrompt(nn.Module):
    """One learned prompt for every image; it starts at zero."""

    def __init__(self, channels: int, height: int, width: int, sigma: float) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(channels, height, width))

    def forward(self, noisy: Tensor) -> Tensor:
        """Prompted pixels `(B, C, H, W)`."""
        return noisy + self.prompt

    def calibrate(self, noisy: Tensor) -> None:
        """Nothing here depends on the data."""


class Coordinator(nn.Module):
    """A prompt from the noisy image: a frozen encoder and a trained decoder that starts at zero.

    The encoder knows sigma, which is the user's own choice, and nothing of the black box: it
    estimates the clean image by blurs and local Wiener filters, and hands on what each would
    change. The decoder mixes these maps, one weight each: SPSA learns few weights well.
    """

    whitening: Tensor

    def __init__(self, channels: int, height: int, width: int, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma
        maps = channels * (len(BLURS) + len(WINDOWS))
        for place, std in enumerate(BLURS):
            self.register_buffer(f"blur_{place}", gaussian(std), persistent=False)
        self.register_buffer("whitening", torch.eye(maps))
        self.decoder = nn.Conv2d(maps, channels, 1)
        nn.init.zeros_(self.decoder.weight)
        nn.init.zeros_(self.decoder.bias)  # type: ignore[arg-type]

    def forward(self, noisy: Tensor) -> Tensor:
        """Prompted pixels `(B, C, H, W)`."""
        features = self.changes(noisy)
        mixed = torch.einsum("ij,bjhw->bihw", self.whitening, features)
        prompt: Tensor = self.decoder(mixed)
        return noisy + prompt

    @torch.no_grad()
    def calibrate(self, noisy: Tensor) -> None:
        """Decorrelate the encoder's maps on one's own noisy images `(B, C, H, W)`.

        SPSA moves every weight by as much, so the weights should matter as much; no query is
        needed for that.
        """
        maps = self.changes(noisy).movedim(1, 0).flatten(1).double()
        values, vectors = torch.linalg.eigh(maps @ maps.T / maps.shape[1])
        scale = (values + SMALLEST * values.max()).rsqrt()
        self.whitening.copy_((vectors * scale) @ vectors.T)

    def changes(self, noisy: Tensor) -> Tensor:
        """Estimates of the clean image minus the noisy one, `(B, maps, H, W)`."""
        planes = noisy.flatten(0, 1)[:, None]
        blurs = [self.get_buffer(f"blur_{place}") for place in range(len(BLURS))]
        estimates = [convolve(planes, kernel) for kernel in blurs]
        estimates += [wiener(planes, side, self.sigma) for side in WINDOWS]
        # Clean pixels lie in [0, 1], so an estimate may be clamped where the noise may not.
        stacked = torch.cat(estimates, 1).clamp(0, 1) - planes
        return stacked.view(len(noisy), -1, *noisy.shape[2:])


class Filter(nn.Module):
    """One filter of the coordinator's encoder in front, nothing trained: a control for prompts."""

    def __init__(
        self, channels: int, height: int, width: int, sigma: float, choice: int = 0
    ) -> None:
        super().__init__()
        self.sigma, self.choice = sigma, choice
        if choice < len(BLURS):
            self.register_buffer("kernel", gaussian(BLURS[choice]), persistent=False)

    def forward(self, noisy: Tensor) -> Tensor:
        """Filtered pixels `(B, C, H, W)`, in [0, 1]."""
        planes = noisy.flatten(0, 1)[:, None]
        if self.choice < len(BLURS):
            filtered = convolve(planes, self.get_buffer("kernel"))
        else:
            filtered = wiener(planes, WINDOWS[self.choice - len(BLURS)], self.sigma)
        return filtered.clamp(0, 1).view_as(noisy)


def gaussian(std: float) -> Tensor:
    """A normalised Gaussian kernel `(1, 1, k, k)`."""
    reach = math.ceil(2.5 * std)
    profile = (-0.5 * (torch.arange(-reach, reach + 1) / std) ** 2).exp()
    kernel = profile[:, None] * profile
    return (kernel / kernel.sum())[None, None]


def convolve(planes: Tensor, kernel: Tensor) -> Tensor:
    """`(N, 1, H, W)` convolved with an odd kernel, edges mirrored."""
    return F.conv2d(mirrored(planes, kernel.shape[-1] // 2), kernel)


def mirrored(planes: Tensor, reach: int) -> Tensor:
    """`(N, 1, H, W)` with `reach` mirrored pixels beyond each edge."""
    return F.pad(planes, (reach,) * 4, mode="reflect")


def wiener(planes: Tensor, side: int, sigma: float) -> Tensor:
    """The local linear estimate: mean + max(var - sigma^2, 0) / var * (pixel - mean)."""
    # No convolutions: on GPUs they round to TF32, and this is a difference of large numbers.
    around = mirrored(planes, side // 2)
    mean = F.avg_pool2d(around, side, stride=1)
    variance = (F.avg_pool2d(around**2, side, stride=1) - mean**2).clamp(min=1e-6)
    return mean + (1 - sigma**2 / variance).clamp(min=0) * (planes - mean)
