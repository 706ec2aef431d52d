"""What of a network may change: one file per kind, one function `adapt` for all."""

from torch import nn

from bench.backbones import head_of
from bench.config import Adapter, Lora, Parameterization, VptDeep
from bench.parameterizations.adapter import insert_adapters
from bench.parameterizations.lora import insert_lora
from bench.parameterizations.prompts import insert_prompts


def adapt(network: nn.Module, settings: Parameterization) -> nn.Module:
    """Insert what `settings` adds and leave gradients on only where it allows them.

    The network computes the same function afterwards, prompts aside. `scratch` differs from
    `full` in where the weights come from, which is the caller's business.
    """
    network.requires_grad_(settings.kind in ("full", "scratch"))
    if settings.kind in ("frozen", "full", "scratch"):
        return network
    if isinstance(settings, Lora):
        return insert_lora(network, settings)
    network = insert_modules(network, settings)
    head_of(network).requires_grad_(True)
    return network


def insert_modules(network: nn.Module, settings: Parameterization) -> nn.Module:
    """Insert the modules that cannot be merged and so are part of the saved network."""
    if isinstance(settings, VptDeep):
        return insert_prompts(network, settings.prompts)
    if isinstance(settings, Adapter):
        return insert_adapters(network, settings.bottleneck)
    return network
