"""What memory running out looks like."""

import torch

# Of the CPU's allocator, of CUDA where it makes its context or captures a graph, and of cuBLAS.
WORDS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated; of some, torch says so in words alone."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(words in str(error) for words in WORDS)
