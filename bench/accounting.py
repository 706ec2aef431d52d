"""What each parameterization trains on ViT-B/16, beside what the rivals' denoisers train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch

from bench.backbones import create_network, head_of
from bench.config import BackboneSettings
from bench.files import atomic_write
from bench.parameterization_settings import (
    Adapter,
    Boft,
    Frozen,
    Lora,
    ParallelAdapter,
    Parameterization,
    VptDeep,
    VptShallow,
)
from bench.parameterizations import adapt
from bench.settings import Settings

BACKBONE = BackboneSettings(timm="vit_base_patch16_224")
WIDTH, DEPTH = 768, 12
CLASSES = {"cifar10": 10, "imagenet": 1000}
# Beside every kind at its defaults: the sizes that published ViT results use.
SIZES: list[Parameterization] = [
    *(VptShallow(kind="vpt_shallow", prompts=count) for count in (5, 50)),
    *(VptDeep(kind="vpt_deep", prompts=count) for count in (1, 5, 50)),
    *(Adapter(kind="adapter", bottleneck=width) for width in (8, 64)),
    *(ParallelAdapter(kind="parallel_adapter", bottleneck=width) for width in (8, 16)),
    *(Lora(kind="lora", r=rank) for rank in (1, 4, 16)),
]
QUERY_VALUE_RANKS = (1, 4, 8, 16)
# google/ddpm-cifar10-32, which the diffusers route of Carlini et al. 2022 loads.
DDPM_CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
}
IMPROVED_DIFFUSION_CIFAR10 = 52_546_438
GUIDED_DIFFUSION_256_PARAMETERS = 552_814_086
# The same network for diffusers, without the three channels that predict a variance.
GUIDED_DIFFUSION_256: dict[str, Any] = {
    "sample_size": 256,
    "layers_per_block": 2,
    "block_out_channels": (256, 256, 512, 512, 1024, 1024),
    "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}


@dataclass(frozen=True)
class Denoiser:
    """A published denoiser, and how many times fewer parameters the paper claims to train."""

    data: str
    denoiser: str
    denoiser_parameters: int
    claimed_ratio: int


def dncnn_parameters(depth: int, width: int, channels: int) -> int:
    """Parameters of Salman et al.'s DnCNN: biases at its first convolution only, batch norms."""
    ends = 2 * 9 * channels * width + width
    return ends + (depth - 2) * (9 * width**2 + 2 * width)


def lora_query_value_parameters(rank: int) -> int:
    """LoRA of queries and values alone (Hu 2022), which timm's fused `qkv` cannot tell apart."""
    return DEPTH * 2 * rank * 2 * WIDTH


def published_denoisers() -> list[Denoiser]:
    """CNN and diffusion denoisers of CIFAR-10 and ImageNet."""
    from diffusers import UNet2DModel

    cnn = dncnn_parameters(depth=17, width=64, channels=3)
    with torch.device("meta"):
        ddpm = sum(p.numel() for p in UNet2DModel(**DDPM_CIFAR10).parameters())
    return [
        Denoiser("cifar10", "DnCNN", cnn, 10),
        Denoiser("cifar10", "ddpm-cifar10-32", ddpm, 1000),
        Denoiser("cifar10", "improved-diffusion", IMPROVED_DIFFUSION_CIFAR10, 1000),
        Denoiser("imagenet", "DnCNN", cnn, 10),
        Denoiser("imagenet", "guided-diffusion 256", GUIDED_DIFFUSION_256_PARAMETERS, 1000),
    ]


def trainable_without_head(settings: Parameterization) -> int:
    """What `settings` trains of ViT-B/16, the head aside; no weights are made."""
    with torch.device("meta"):
        network = create_network(BACKBONE, CLASSES["cifar10"], 3)
    # peft reads values of its own permutations when it builds BOFT.
    with torch.device("cpu" if isinstance(settings, Boft) else "meta"):
        network = adapt(network, settings, steps=100)
    head = sum(p.numel() for p in head_of(network).parameters() if p.requires_grad)
    return sum(p.numel() for p in network.parameters() if p.requires_grad) - head


def _spelled(settings: Settings) -> str:
    return ", ".join(f"{k}={v}" for k, v in settings.model_dump(exclude={"kind"}).items())


def trained_sizes() -> pd.DataFrame:
    """One row per kind and size; `counted` tells what was built from what a formula gives."""
    kinds = [kind for kind in get_args(get_args(Parameterization)[0]) if kind is not Frozen]
    names = [get_args(kind.model_fields["kind"].annotation)[0] for kind in kinds]
    defaults = [kind(kind=name) for kind, name in zip(kinds, names, strict=True)]
    every = sorted([*defaults, *SIZES], key=lambda size: names.index(size.kind))
    rows = [(s.kind, _spelled(s), "built", trainable_without_head(s)) for s in every]
    rows += [
        ("lora", f"r={rank}, of q and v alone", "formula", lora_query_value_parameters(rank))
        for rank in QUERY_VALUE_RANKS
    ]
    return pd.DataFrame(rows, columns=["kind", "settings", "counted", "trainable_without_head"])


def build_accounting(output: Path) -> list[str]:
    """Write every size against every denoiser as CSV; return one line per denoiser.

    A row says by what factor the PEFT trains fewer parameters than the denoiser, with and without
    the head of the denoiser's data set, and whether that reaches the paper's claim.
    """
    table = trained_sizes().merge(pd.DataFrame(published_denoisers()), how="cross")
    head = table["data"].map({name: (WIDTH + 1) * count for name, count in CLASSES.items()})
    table.insert(4, "trainable_with_head", table["trainable_without_head"] + head)
    for part in ("without_head", "with_head"):
        ratio = table["denoiser_parameters"] / table[f"trainable_{part}"]
        table[f"ratio_{part}"] = ratio
        table[f"holds_{part}"] = ratio >= table["claimed_ratio"]
    with atomic_write(output) as temporary:
        table.to_csv(temporary, index=False)
    return [
        f"{data}, {name}: {part['holds_without_head'].sum()} of {len(part)} parameterizations"
        f" train {claimed} times fewer parameters without the head,"
        f" {part['holds_with_head'].sum()} with it"
        for (data, name, claimed), part in table.groupby(
            ["data", "denoiser", "claimed_ratio"], sort=False
        )
    ]
