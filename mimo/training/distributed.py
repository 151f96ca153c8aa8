"""Many processes that train one model: who they are, how they agree, and how they share the model.

    ddp     every rank holds the whole model; gradients are averaged while the backward still runs
    fsdp    every rank holds a part of every parameter, of its average and of its optimizer state (FSDP2,
            `fully_shard`);
            a block is gathered when it runs, and its gradient leaves as a part again

Hosts talk over gloo, GPUs over nccl, in one process group: whatever the hosts agree on, they agree on without waiting
for a GPU. Everything here also works for a process alone, where it does nothing.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mimo.errors import InputError, tell_launcher

T = TypeVar("T")


class ReportedElsewhere(InputError):
    """Bad input that another rank has seen and reports. Has no words, so that the user reads them once."""


@dataclass(frozen=True)
class World:
    """This process among those that train together. The only place that asks: data, seeds and output follow from it."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this process writes the log and the previews, and gives checkpoints their place."""
        return self.rank == 0

    def agree(self, number: int = 0, error: Exception | None = None) -> int:
        """Waits for every rank and returns the largest number among them.

        If any rank has an error, all raise: the first of those that have one its own, every other ReportedElsewhere.
        """
        if self.size > 1:
            said = torch.tensor([number, 0 if error is None else self.size - self.rank])
            dist.all_reduce(said, dist.ReduceOp.MAX)
            number, failed = said.tolist()
            if failed and failed != self.size - self.rank:
                raise ReportedElsewhere()
        if error is not None:
            raise error
        return number

    @contextmanager
    def together(self) -> Iterator[None]:
        """A ValueError (bad input) in this block on one rank ends it on all. The block itself may not communicate."""
        error = None
        try:
            yield
        except ValueError as caught:
            error = caught
        self.agree(error=error)

    def gather(self, item: T) -> list[T]:
        """Everyone's item, by rank."""
        items = [item] * self.size
        if self.size > 1:
            dist.all_gather_object(items, item)
        return items

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks, on the host."""
        value = value.to("cpu", copy=True)
        if self.size > 1:
            dist.all_reduce(value)
        return value / self.size


@contextmanager
def process_group(*, gpu: bool) -> Iterator[World]:
    """The processes that torchrun (or another launcher with its environment) started, as a group while the block runs.

    Without such an environment the process is alone. On a GPU machine, process number LOCAL_RANK takes that GPU.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World()
        return
    if gpu:
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank > gpus:
            raise ReportedElsewhere()  # by the first process that is one too many
        if local_rank == gpus:
            error = InputError(f"LOCAL_RANK={local_rank}: expected a process per GPU, of which this machine has {gpus}")
            tell_launcher(error)
            raise error
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    together = False
    try:
        yield World.current()
        together = True
    except InputError as error:
        together = True  # see World.agree
        tell_launcher(error)
        raise
    finally:
        if together:  # after a fault of this rank alone the others will not answer: leaving closes what they wait for
            dist.destroy_process_group()


def distribute(
    module: nn.Module, blocks: Iterable[nn.Module], strategy: str, device: torch.device, *, offload: bool, varies: bool
) -> nn.Module:
    """`module` on `device`, as all ranks train it together: what its forward is called through from now on.

    With "fsdp" no device holds the whole network for training. It holds its shards: 4 bytes per parameter, and as much
    again for the average, for each of AdamW's moments and for the gradient, all over the number of ranks. Besides them
    it holds what belongs to no block, and one block whole while that is sharded, two while it trains (the next is
    gathered ahead). Each process's host memory holds the whole network until it is sharded: every rank draws all
    weights, as one process alone draws them, and keeps its part.

    Args:
        module: in the host's memory, the same on every rank. "fsdp" turns its parameters into DTensors, in place.
        blocks: parts of it that are gathered and reduced one at a time.
        strategy: "none", "ddp" or "fsdp".
        offload: keep what is sharded in the host's memory and update it there.
        varies: a parameter may have no gradient in one step and have one in another.
    """
    if strategy == "none":
        return module.to(device)
    if not dist.is_initialized():
        raise InputError(f"strategy={strategy!r}: expected processes that torchrun has started")
    # A group of their own, as they outlive `process_group` where an exception holds them: if they were the last to hold
    # the group that ranks agree in, its threads would end when the interpreter does, and may then wait for each other.
    group = cast(dist.ProcessGroup, dist.new_group())  # of all ranks, so each is in it
    if strategy == "ddp":
        return DistributedDataParallel(
            module.to(device), process_group=group, find_unused_parameters=varies, gradient_as_bucket_view=not varies
        )
    # No MixedPrecisionPolicy: parameters are gathered as they are, in fp32, and autocast rounds those that enter matrix
    # products, as on one GPU. A policy is the same for all parameters of a module, so gathering in bf16 would halve the
    # traffic but round what autocast leaves alone too (norms, positions, the bias of bias_gelu, weights on their way to
    # float8), and the loss curve would be another one.
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    mesh = DeviceMesh.from_group(group, device.type)
    # A block's gate is a view of its modulation. Nobody writes to it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for part in (*blocks, module):  # each moves what it shards to the device, and leaves the rank's part there
        fully_shard(part, mesh=mesh, offload_policy=policy)
    return module


def reducing(module: nn.Module, last: bool) -> AbstractContextManager:
    """Around forward and backward of one micro batch: gradients are exchanged behind the last one alone."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The part of each tensor that this rank holds."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """The tensor that all ranks hold together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class StopRequest:
    """Turns SIGTERM or SIGINT into `signal`. A second SIGINT acts as usual, and so does every signal if not enabled.

    In a group no second one acts: torchrun repeats to its processes what a terminal or a scheduler has told them
    already, and has its own limit (--shutdown-timeout) for how long they may take.
    """

    def __init__(self, *, enabled: bool, world: World) -> None:
        self.signal, self.world = 0, world
        self.enabled = (
            enabled and threading.current_thread() is threading.main_thread()
        )  # only there can handlers be set
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if self.enabled:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        self.signal = number
        # torchrun and schedulers tell the processes that read data too. torch would raise their end in the middle of
        # whatever happens here then, a step or a checkpoint; for good, as it goes on asking for them.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self.world.size == 1:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
