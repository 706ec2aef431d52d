"""Gaussian noise that depends on what is drawn and on nothing else."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 32


def noise_key(seed: int, data: str, image: int, domain: str, block: int) -> int:
    """64-bit Philox key of one block of 32 draws.

    Hashing instead of counting: neighbouring keys must share no stream, and two domains
    (`selection`, `estimation`) must be independent for the certificate to hold.
    """
    text = f"{seed}/{data}/{image}/{domain}/{block}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def standard_normal(keys: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Float32 N(0, 1) draws `(len(keys) * 32, C, H, W)`, block i from `keys[i]`.

    torch's CPU generator takes 32-bit seeds only, so blocks would repeat; its stateless Philox
    takes 64-bit keys, and gives the same bits whatever the batch, the order and the shard.
    """
    pairs = torch.tensor([[key, 0] for key in keys], dtype=torch.uint64, device=device)
    draws = torch.empty(len(keys), BLOCK * shape[0] * shape[1] * shape[2], device=device)
    torch.ops.aten._philox_normal_(draws, pairs[:, None])
    return draws.view(len(keys) * BLOCK, *shape)
