"""Every kind that peft makes: one table from settings to peft's configuration, one builder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import BenchError
from bench.parameterization_settings import (
    AdaLora,
    Boft,
    Dora,
    FourierFt,
    Hra,
    Ia3,
    LnTuning,
    Loha,
    Lokr,
    Lora,
    Oft,
    Pissa,
    RsLora,
    VbLora,
    Vera,
)
from bench.parameterizations.places import (
    dense_layers,
    head_name,
    keys_and_values,
    mlp_outputs,
    norms_and_head,
    pattern_of,
    transformer_layers,
)
from bench.settings import Settings


def _own_keys(settings: Settings, network: nn.Module, steps: int) -> dict[str, Any]:
    return settings.model_dump(exclude={"kind"})


def _adalora_keys(settings: AdaLora, network: nn.Module, steps: int) -> dict[str, Any]:
    keys = settings.model_dump(exclude={"kind", "warmup", "final"})
    schedule = {
        "total_step": steps,
        "tinit": int(settings.warmup * steps),
        "tfinal": int(settings.final * steps),
    }
    return keys | schedule


def _ia3_keys(settings: Ia3, network: nn.Module, steps: int) -> dict[str, Any]:
    return {"feedforward_modules": pattern_of(mlp_outputs(network))}


def _ia3_targets(network: nn.Module) -> list[str]:
    return [*keys_and_values(network), *mlp_outputs(network)]


def _pull_to_orthogonality(network: nn.Module) -> None:
    """Add the gradient of AdaLoRA's penalty; peft adds it to models that return a loss alone."""
    weight = network.peft_config["default"].orth_reg_weight  # type: ignore[union-attr, index]
    factors = [p for n, p in network.named_parameters() if ".lora_A." in n or ".lora_B." in n]
    for factor in factors:

        def with_penalty(gradient: Tensor, factor: nn.Parameter = factor) -> Tensor:
            if factor.grad is not None:  # an earlier micro-batch of this step has had it
                return gradient
            rows = factor.detach() if len(factor) < factor.shape[1] else factor.detach().T
            excess = rows @ rows.T - torch.eye(len(rows), device=rows.device)
            pull = 2 * excess @ rows / excess.norm().clamp_min(1e-12)
            pull = pull if rows.shape == factor.shape else pull.T
            return gradient + weight / len(factors) * pull

        factor.register_hook(with_penalty)


@dataclass(frozen=True)
class Tuner:
    """How settings become a peft configuration.

    Attributes:
        config: name of peft's configuration class.
        fixed: its arguments that make the kind what it is.
        targets: names of the adapted layers; where the head is among them, peft trains it so.
        keys: its arguments that follow from the settings, the network and the number of steps.
        prepare: what the adapted network needs beside.
    """

    config: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    targets: Callable[[nn.Module], list[str]] = dense_layers
    keys: Callable[[Any, nn.Module, int], dict[str, Any]] = _own_keys
    prepare: Callable[[nn.Module], None] = lambda network: None


TUNERS: dict[type[Settings], Tuner] = {
    Lora: Tuner("LoraConfig"),
    RsLora: Tuner("LoraConfig", {"use_rslora": True}),
    Pissa: Tuner("LoraConfig", {"init_lora_weights": "pissa"}),
    Dora: Tuner("LoraConfig", {"use_dora": True}),
    AdaLora: Tuner("AdaLoraConfig", keys=_adalora_keys, prepare=_pull_to_orthogonality),
    Ia3: Tuner("IA3Config", targets=_ia3_targets, keys=_ia3_keys),
    # peft's OFT takes the channels-last maps that ConvNeXt gives its linear layers for images.
    Oft: Tuner("OFTConfig", targets=transformer_layers),
    Boft: Tuner("BOFTConfig", {"boft_n_butterfly_factor": 1}),
    Vera: Tuner("VeraConfig"),
    Loha: Tuner("LoHaConfig"),
    Lokr: Tuner("LoKrConfig"),
    # peft's default start is random; zeros start from the base, as the other kinds do.
    FourierFt: Tuner("FourierFTConfig", {"init_weights": True}),
    # peft leaves a copied head wrapped when it merges layer norms, so the head is a target.
    LnTuning: Tuner("LNTuningConfig", targets=norms_and_head),
    Hra: Tuner("HRAConfig"),
    VbLora: Tuner("VBLoRAConfig"),
}


def insert_tuner(network: nn.Module, settings: Settings, steps: int) -> nn.Module:
    """Wrap the layers that `settings` adapts; the head is trained along.

    Raises:
        BenchError: the kind does not fit this network.
    """
    import peft

    tuner = TUNERS[type(settings)]
    head, targets = head_name(network), tuner.targets(network)
    keys = dict(tuner.fixed) | tuner.keys(settings, network, steps)
    if not targets:
        raise _misfit(network, settings, "it has no layers of the kind that this adapts")
    try:
        config = getattr(peft, tuner.config)(
            target_modules=pattern_of(targets),
            modules_to_save=None if head in targets else [head],
            **keys,
        )
        adapted: nn.Module = peft.get_peft_model(network, config)  # type: ignore[arg-type]
    except (ValueError, TypeError, NotImplementedError, AssertionError, RuntimeError) as error:
        raise _misfit(network, settings, str(error)) from None
    tuner.prepare(adapted)
    return adapted


def _misfit(network: nn.Module, settings: Settings, why: str) -> BenchError:
    return BenchError(
        f"parameterization {settings.model_dump()} does not fit {type(network).__name__}: {why}; "
        "change its keys or its kind (config/README.md tells which kinds fit which backbones)"
    )


class BudgetAllocation:
    """peft's `update_and_allocate` after every step, with what it keeps between steps."""

    AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")

    def __init__(self, tuner: Any) -> None:
        self.tuner, self.step = tuner, 0

    def __call__(self) -> None:
        """Weigh the ranks by the step's gradients, and mask the least of them."""
        self.tuner.update_and_allocate(self.step)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Steps done, importance of the weights, and which ranks are left."""
        allocator = self.tuner.rankallocator
        averages = {name: dict(getattr(allocator, name)) for name in self.AVERAGES}
        return {
            "step": self.step,
            "rank_pattern": self.tuner.peft_config["default"].rank_pattern,
            **averages,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.step = state["step"]
        self.tuner.peft_config["default"].rank_pattern = state["rank_pattern"]
        for name in self.AVERAGES:
            setattr(self.tuner.rankallocator, name, state[name])


def step_hook(network: nn.Module) -> BudgetAllocation | None:
    """What `network` needs after every optimizer step: some tuners move their budget then."""
    tuner = getattr(network, "base_model", None)
    return BudgetAllocation(tuner) if hasattr(tuner, "update_and_allocate") else None
