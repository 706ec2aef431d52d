"""Gaussian noise that depends on what is drawn and on nothing else."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
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


def key_tensor(keys: Sequence[int], device: torch.device) -> Tensor:
    """Keys `(n,)` as the unsigned integers that the generator takes."""
    return torch.from_numpy(np.array(keys, np.uint64)).to(device)


def standard_normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Float32 N(0, 1) draws `(n * 32, C, H, W)` on the device of `keys`, block i from key i.

    torch's CPU generator takes 32-bit seeds only, so blocks would repeat; its stateless Philox
    takes 64-bit keys, and gives the same bits whatever the batch, the order and the shard.
    """
    pairs = torch.stack([keys, torch.zeros_like(keys)], dim=1)
    draws = torch.empty(len(keys), BLOCK * shape[0] * shape[1] * shape[2], device=keys.device)
    if keys.device.type != "cpu":
        _fill(draws, pairs[:, None])  # in the caller's stream, which threads do not have
        return without_nan(draws).view(len(keys) * BLOCK, *shape)
    parts = torch.get_num_threads()
    work = [*zip(draws.tensor_split(parts), pairs[:, None].tensor_split(parts), strict=True)]
    # The operator runs on one thread, and would be most of the time beside a network on many.
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(lambda part: _fill(*part), work))
    return draws.view(len(keys) * BLOCK, *shape)


@torch.inference_mode()
def _fill(draws: Tensor, keys: Tensor) -> None:
    if len(draws):
        torch.ops.aten._philox_normal_(draws, keys)


def without_nan(draws: Tensor) -> Tensor:
    """`draws` with 0, which is next to what they stand for, where CUDA left NaN.

    Its fast logarithm may be above 0 next to 1, and the root of minus that is none.
    """
    return draws.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
