"""What memory running out looks like, and how to let go of it."""

import gc

import torch

# Of the CPU's allocator, of CUDA's where the compiler met it, of CUDA where it makes its context or
# captures a graph, of Triton, cuBLAS and cuDNN; the last where no convolution's workspace fits,
# since cuDNN then tries them all.
WORDS = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated; of some, torch says so in words alone.

    An error that came of another one, such as that of a graph whose capture failed, counts as it.
    """
    kinds = (MemoryError, torch.OutOfMemoryError)
    seen: list[BaseException] = []
    earlier: BaseException | None = error
    while earlier is not None and earlier not in seen:
        if isinstance(earlier, kinds) or any(words in str(earlier) for words in WORDS):
            return True
        seen.append(earlier)
        hidden = earlier.__suppress_context__
        earlier = earlier.__cause__ or (None if hidden else earlier.__context__)
    return False


def release_memory() -> None:
    """Let go of compiled networks, of their graphs' memory and of what allocators keep."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
