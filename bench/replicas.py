"""Data parallel: processes that torchrun's launcher starts, each with a share of every batch.

Every process holds the model; gradients are averaged once per step, after all micro-batches, so an
objective may call the model as often as it likes, which `DistributedDataParallel` does not allow.
Noise and dropout are of each process's own.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, distributed, nn

from bench.errors import BenchError

# Seeds of one training's processes lie apart from the seeds that experiments name.
SEED_STRIDE = 1_000_000_007
LAUNCHER = "BENCH_LAUNCHER"
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that the end of the parent sends


def count() -> int:
    """How many processes train together; 1 outside `in_processes`."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 also leads: it alone saves and reports."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def check_count(wanted: int) -> None:
    """Make sure that `wanted` processes train here.

    Raises:
        BenchError: there are others.
    """
    if count() != wanted:
        raise BenchError(
            f"training.processes is {wanted}, and {count()} train here: set it to 1, or start the "
            "job by `python -m bench` or `python -m baselines...` itself, which starts the others "
            "(a baseline's own, where `run_baseline` has `spread=True`)"
        )


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
        _end_with_launcher()
        _join()
        work()
        distributed.destroy_process_group()
    else:
        gpus = torch.cuda.device_count()
        if 0 < gpus < wanted:
            raise BenchError(
                f"training.processes is {wanted}, GPUs that the job sees: {gpus}: lower it, or "
                "give the job as many GPUs"
            )
        _launch(wanted, sys.orig_argv)


def _launch(wanted: int, command: list[str]) -> None:
    # Slow to import, and not for certification.
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // wanted))
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=wanted,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    try:
        elastic_launch(config, sys.executable)(*command[1:])
    except ChildFailedError:
        sys.exit(1)
    except SignalException as error:
        sys.exit(128 + error.sigval)


def _end_with_launcher() -> None:
    """Processes have sessions of their own: whoever kills a job's process group misses them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):
        sys.exit("error: the launcher of this training has ended")


def _join() -> None:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # By itself torch would take NCCL alone, which knows no tensors of the CPU.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    if rank():
        logging.getLogger().setLevel(logging.WARNING)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Around what needs all processes; errors of the network there mean that one has ended."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise BenchError(f"another process of this training has ended ({said:.200})") from None


def seed_of(seed: int) -> int:
    """The seed of this process's noise; that of the first is `seed` itself."""
    return seed + rank() * SEED_STRIDE


def share(positions: Tensor) -> Tensor:
    """This process's part of a batch."""
    return positions[rank() :: count()]


@torch.no_grad()
def average(parameters: Iterable[nn.Parameter], others: Iterable[Tensor]) -> None:
    """Replace gradients, and other tensors, by their means over the processes.

    A parameter without a gradient in some process counts there as zero; without one in any, it
    stays without.
    """
    if count() == 1:
        return
    trained, rest = list(parameters), list(others)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    device = gradients[0].device
    there = torch.tensor([float(p.grad is not None) for p in trained], device=device)
    packed = [there, *gradients, *rest]
    together = torch.cat([tensor.flatten() for tensor in packed])
    with _together():
        distributed.all_reduce(together)
    together /= count()
    parts = together.split([tensor.numel() for tensor in packed])
    for tensor, part in zip(packed, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
    for parameter, gradient, known in zip(trained, gradients, there.tolist(), strict=True):
        parameter.grad = gradient if known else None


def batch_statistics(module: nn.Module) -> list[Tensor]:
    """What batch normalisations in training mode know of the images so far."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    found = [(n.running_mean, n.running_var) for n in norms if n.training]
    return [statistic for pair in found for statistic in pair if statistic is not None]


def agreed(due: bool) -> bool:
    """What the first process says, to all."""
    if count() == 1:
        return due
    answer = torch.tensor(due)
    with _together():
        distributed.broadcast(answer, 0)
    return bool(answer)


def gathered(state: Tensor) -> list[Tensor]:
    """A CPU tensor of every process, by rank; they have one shape."""
    if count() == 1:
        return [state]
    states = [torch.empty_like(state) for _ in range(count())]
    with _together():
        distributed.all_gather(states, state)
    return states
