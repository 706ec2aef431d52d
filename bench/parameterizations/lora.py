"""Low-rank adaptation by peft (Hu et al. 2022)."""

from torch import nn

from bench.config import Lora

# A regular expression: the plain list of names would also hit `patch_embed.proj`.
TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"


def insert_lora(network: nn.Module, settings: Lora) -> nn.Module:
    """Wrap the attention and MLP layers of every block; the head is copied and trained."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        target_modules=TARGETS,
        modules_to_save=["head"],
    )
    return get_peft_model(network, config)  # type: ignore[arg-type, return-value]
