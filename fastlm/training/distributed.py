"""One process, or several started by torchrun that each train on their share of every step."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..devices import find_device


@dataclass(frozen=True)
class World:
    """This process among its equals; `join` makes one."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: str) -> "World":
        """Joins torchrun's processes, where there are any (it sets RANK and WORLD_SIZE)."""
        if "RANK" not in os.environ:
            find_device(device, "train")
            return cls()
        if device == "cuda":
            torch.cuda.set_device(find_device(f"cuda:{os.environ['LOCAL_RANK']}", "train"))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model`, its gradients averaged over the processes in backward."""
        return nn.parallel.DistributedDataParallel(model) if self.size > 1 else model

    def exchange(self, model: Any, last: bool) -> AbstractContextManager:
        """Around a pass of the wrapped model: gradients are exchanged once a step, in the last."""
        return nullcontext() if self.size == 1 or last else model.no_sync()

    def sum(self, value: float, device: torch.device) -> float:
        """The sum of every process's `value`."""
        if self.size == 1:
            return value
        total = torch.tensor(float(value), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.item()

    def wait(self) -> None:
        """Returns once every process is here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Ends the group, once every process is here.

        The wait matters: gloo's threads need the interpreter's lock to drop the last exchange's
        tensors, and a process that ends at once may hold it while it waits for them.
        """
        self.wait()
        if self.size > 1:
            dist.destroy_process_group()
