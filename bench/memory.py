"""What memory running out looks like."""

import torch

# Of the CPU's allocator, of CUDA where it makes its context or captures a graph, of Triton, cuBLAS
# and cuDNN; the last where no convolution's workspace fits, since cuDNN then tries them all.
WORDS = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated; of some, torch says so in words alone."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(words in str(error) for words in WORDS)
