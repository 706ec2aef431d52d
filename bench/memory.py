"""What memory running out looks like."""

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated; of the CPU's, torch says so in words alone."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
