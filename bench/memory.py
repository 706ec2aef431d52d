"""What memory running out looks like."""

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether torch failed to allocate memory; on the CPU it says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
