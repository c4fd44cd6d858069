"""Distributed training: each process (rank) takes some episodes of a step, and gradients are summed over the ranks.

torchrun starts the ranks, or `launched` does on this machine. Results equal those of one process up to rounding, if
`meta_loss` uses no random numbers; these differ between ranks.
"""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from kshot.data.episodes import Episodes
from kshot_runtime.errors import KshotError

_STARTING = datetime.timedelta(minutes=5)  # timeout for all ranks to connect
_WAITING = datetime.timedelta(days=1)  # timeout of an operation: other ranks wait while the first one validates

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and the number of ranks."""

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.number == 0

    def part(self, batch: Episodes) -> Episodes:
        """This rank's episodes of a batch."""
        start, stop = (len(batch) * number // self.count for number in (self.number, self.number + 1))
        return batch if self.count == 1 else batch.part(start, stop)

    def add_up(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Sum the gradients of the parameters over the ranks, in place, and return the sum of the losses ()."""
        if self.count == 1:
            return loss
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        values = torch.cat([loss.flatten(), *(p.grad.flatten() for p in trained if p.grad is not None)])
        dist.all_reduce(values)
        total, *gradients = values.split([1, *(p.numel() for p in trained)])
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return total[0]

    def share(self, make: Callable[[], T]) -> T:
        """Call `make` on the first rank only, and return its result on all ranks."""
        if self.count == 1:
            return make()
        result: list[Any] = [make() if self.first else None]
        dist.broadcast_object_list(result, device=torch.device("cpu"))
        return result[0]

    def check_alike(self, learner: nn.Module) -> None:
        """A KshotError if weights or buffers differ between ranks, as they do if the learner updates buffers."""
        if self.count == 1:
            return
        for name, value in learner.state_dict().items():
            least, most = value.double().sum(), value.double().sum()
            dist.all_reduce(least, dist.ReduceOp.MIN)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            if not torch.equal(least, most) and not (least.isnan() and most.isnan()):
                raise KshotError(
                    f"{name} differs between the ranks of this training: the learner changes it other than by "
                    "gradients, from the episodes of one rank only. Train in one process."
                )


def join(device: str) -> tuple[Ranks, str]:
    """Connect to the ranks of this training, if it has several; return them, and the device of this process.

    They stay connected until this process or the block of `launched` ends.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
        return Ranks(), device
    if device == "cuda":
        number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= gpus:
            raise KshotError(f"each rank needs a separate GPU, and this machine has {gpus}: start as many ranks")
        device = f"cuda:{number}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        store, rank, world = next(rendezvous("env://", timeout=_STARTING))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_WAITING)
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def launched(count: int, work: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """Start `count` - 1 ranks that run `work(*arguments)`; inside the block, this process is the first rank."""
    if count == 1:
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads, before = torch.get_num_threads(), dict(os.environ)
    processes = [
        multiprocessing.get_context("spawn").Process(
            target=_work,
            args=(_environment(number, count, port), max(1, threads // count), work, arguments),
            daemon=True,
        )
        for number in range(1, count)
    ]
    for process in processes:
        process.start()
    torch.set_num_threads(max(1, threads // count))
    os.environ.update(_environment(0, count, port))
    try:
        yield
    except RuntimeError as error:  # from torch.distributed, if a rank has ended
        for process in processes:
            process.join(5)
        if any(process.exitcode for process in processes):
            raise KshotError(f"another rank of this training has ended, so all of them end: {error}") from None
        raise
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        _leave()
        torch.set_num_threads(threads)
        for name in _environment(0, count, port):
            os.environ.pop(name)
        os.environ.update(before)
        for process in processes:
            process.join(5)
            process.kill()


def _environment(number: int, count: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun sets for a rank."""
    ours = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in ours.items()}}


def _work(environment: dict[str, str], threads: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first rank also receives it, and ends the others
    os.environ.update(environment)
    torch.set_num_threads(threads)
    try:
        work(*arguments)
    except KshotError:  # the first rank reports it
        raise SystemExit(1) from None
    except RuntimeError as error:  # usually because the first rank has ended
        raise SystemExit(f"rank {environment['RANK']} of this training ends: {error}") from None
