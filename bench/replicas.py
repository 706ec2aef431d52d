"""Data parallel: processes that torchrun's launcher starts, each with a share of every batch.

Every process holds the model; gradients are averaged once per step, after all micro-batches, so an
objective may call the model as often as it likes, which `DistributedDataParallel` does not allow.
Noise and dropout are of each process's own.
"""

import ctypes
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bench.errors import BenchError

# Seeds of one training's processes lie apart from the seeds that experiments name.
SEED_STRIDE = 1_000_000_007
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that the end of the parent sends


def count() -> int:
    """How many processes train together; 1 outside `in_processes`."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 also leads: it alone saves and reports."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def in_processes(wanted: int, work: Callable[[], None]) -> None:
    """Run `work` in `wanted` processes, each on a GPU of its own where there are GPUs.

    The first call repeats the command line of this process that often and waits; in these
    processes `work` runs.

    Raises:
        BenchError: there are fewer GPUs than processes.
        SystemExit: one of the processes failed, and has said why.
    """
    if wanted == 1:
        work()
    elif distributed.is_torchelastic_launched():
        _join()
        work()
        distributed.destroy_process_group()
    else:
        gpus = torch.cuda.device_count()
        if 0 < gpus < wanted:
            raise BenchError(
                f"training.processes is {wanted} and there are {gpus} GPUs: lower it, or give the "
                "job more"
            )
        _launch(wanted, sys.orig_argv)


def _launch(wanted: int, command: list[str]) -> None:
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // wanted))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=wanted,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*command[1:])
    except ChildFailedError:
        sys.exit(1)
    except SignalException as error:
        sys.exit(128 + error.sigval)


def _join() -> None:
    # They have sessions of their own: whoever kills a job's process group misses them.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Tensors of the CPU go by gloo, those of GPUs by NCCL.
    distributed.init_process_group()
    if rank():
        logging.getLogger().setLevel(logging.WARNING)


def seed_of(seed: int) -> int:
    """The seed of this process's noise; that of the first is `seed` itself."""
    return seed + rank() * SEED_STRIDE


def share(positions: Tensor) -> Tensor:
    """This process's part of a batch."""
    return positions[rank() :: count()]


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], loss: Tensor) -> None:
    """Replace gradients, and `loss`, by their means over the processes.

    A parameter without a gradient in one process counts there as zero.
    """
    if count() == 1:
        return
    trained = list(parameters)
    kept = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    together = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in kept)])
    distributed.all_reduce(together)
    together /= count()
    mean, *parts = together.split([1, *(gradient.numel() for gradient in kept)])
    loss.copy_(mean.squeeze())
    for parameter, gradient, part in zip(trained, kept, parts, strict=True):
        parameter.grad = gradient.copy_(part.view_as(gradient))


def agreed(due: bool) -> bool:
    """What the first process says, to all."""
    if count() == 1:
        return due
    answer = torch.tensor(due)
    distributed.broadcast(answer, 0)
    return bool(answer)


def gathered(state: Tensor) -> list[Tensor]:
    """A CPU tensor of every process, by rank; they have one shape."""
    if count() == 1:
        return [state]
    states = [torch.empty_like(state) for _ in range(count())]
    distributed.all_gather(states, state)
    return states
