"""Where in a timm model what is inserted goes, found by role."""

import re
from collections.abc import Iterable, Iterator

from torch import nn

from bench.backbones import head_of

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
# Rows of these matrices are keys and values; a fused projection holds the queries as well.
KEYS_AND_VALUES = r"(.+\.)?(qkv|kv|[kv](_proj)?)"


def head_name(network: nn.Module) -> str:
    """The name of the classification head."""
    head = head_of(network)
    return next(name for name, module in network.named_modules() if module is head)


def blocks_of(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The named residual blocks: modules that own an MLP."""
    for name, module in network.named_modules():
        if isinstance(getattr(module, "mlp", None), nn.Module):
            yield name, module


def dense_layers(network: nn.Module) -> list[str]:
    """Linear layers and ungrouped convolutions of every block's attention and MLP."""
    found = []
    for block_name, block in blocks_of(network):
        for part in ("attn", "mlp"):
            for name, module in getattr(block, part, nn.Identity()).named_modules():
                if _is_dense(module):
                    found.append(".".join(filter(None, (block_name, part, name))))
    return found


def _is_dense(module: nn.Module) -> bool:
    ungrouped = isinstance(module, nn.Conv2d) and module.groups == 1
    return isinstance(module, nn.Linear) or ungrouped


def transformer_layers(network: nn.Module) -> list[str]:
    """The dense layers of networks whose blocks have attention."""
    return dense_layers(network) if any(hasattr(b, "attn") for _, b in blocks_of(network)) else []


def keys_and_values(network: nn.Module) -> list[str]:
    """Of the dense layers those that compute keys and values."""
    return [name for name in dense_layers(network) if re.fullmatch(KEYS_AND_VALUES, name)]


def mlp_outputs(network: nn.Module) -> list[str]:
    """Of the dense layers the last one of every MLP."""
    last = {name.rsplit(".mlp.", 1)[0]: name for name in dense_layers(network) if ".mlp." in name}
    return list(last.values())


def norms_and_head(network: nn.Module) -> list[str]:
    """Normalisation layers that have weights, and the head."""
    norms = [
        name
        for name, module in network.named_modules()
        if isinstance(module, NORMS) and any(True for _ in module.parameters())
    ]
    return [*norms, head_name(network)]


def pattern_of(names: Iterable[str]) -> str:
    """A regular expression for the full `names`, block numbers generalised.

    A list of names would do for peft, but it matches by suffix and is saved in random order.
    """
    general = dict.fromkeys(re.sub(r"\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names)
    return "|".join(general)
