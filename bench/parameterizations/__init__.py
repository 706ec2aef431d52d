"""What of a network may change: tables from settings to what they insert and train."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from bench.backbones import head_of
from bench.parameterization_settings import (
    Adapter,
    Bias,
    Frozen,
    Full,
    ParallelAdapter,
    Parameterization,
    Scratch,
    VptDeep,
    VptShallow,
)
from bench.parameterizations.adapter import insert_adapters, insert_parallel_adapters
from bench.parameterizations.prompts import insert_deep_prompts, insert_shallow_prompts
from bench.parameterizations.tuners import TUNERS, insert_tuner, step_hook
from bench.settings import Settings

__all__ = ["adapt", "insert_modules", "step_hook"]

INSERTIONS: dict[type[Settings], Callable[[nn.Module, Any], None]] = {
    VptShallow: insert_shallow_prompts,
    VptDeep: insert_deep_prompts,
    Adapter: insert_adapters,
    ParallelAdapter: insert_parallel_adapters,
}


def _head(network: nn.Module) -> Iterable[nn.Parameter]:
    return head_of(network).parameters()


def _biases_and_head(network: nn.Module) -> Iterable[nn.Parameter]:
    biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
    return [*biases, *_head(network)]


# Which of the network's own weights are trained; the head, where nothing else is said.
TRAINED: dict[type[Settings], Callable[[nn.Module], Iterable[nn.Parameter]]] = {
    Frozen: lambda network: [],
    Full: nn.Module.parameters,
    Scratch: nn.Module.parameters,
    Bias: _biases_and_head,
}


def adapt(network: nn.Module, settings: Parameterization, steps: int) -> nn.Module:
    """Insert what `settings` adds and leave gradients on only where it allows them.

    `scratch` differs from `full` in where the weights come from, which is the caller's business.

    Args:
        network: a timm model; it is changed in place.
        settings: the parameterization.
        steps: of the training to come, which some schedules need.
    """
    network.requires_grad_(False)
    if type(settings) in TUNERS:
        return insert_tuner(network, settings, steps)
    own = list(TRAINED.get(type(settings), _head)(network))
    insert_modules(network, settings)
    for parameter in own:
        parameter.requires_grad_(True)
    return network


def insert_modules(network: nn.Module, settings: Parameterization) -> None:
    """Insert the modules that cannot be merged and so are part of the saved network."""
    if type(settings) in INSERTIONS:
        INSERTIONS[type(settings)](network, settings)
