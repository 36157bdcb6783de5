"""Several processes that make one clone together: who does what, and how results are combined.

Every process is called with the same arguments and takes the same steps. The batches of the support are dealt out in
turn, the processes exchange sums and features, and each computes the rest itself.
"""

import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pnc.foundation.argument_checks import usable_device
from pnc.foundation.errors import InputError


@dataclass(frozen=True)
class Team:
    """The processes that share a job, as seen by one of them.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and output."""
        return self.rank == 0

    def is_mine(self, number: int) -> bool:
        """Whether this process does piece `number` of the work."""
        return number % self.size == self.rank

    def agree(self, tensor: Tensor) -> bool:
        """Whether all processes hold equal tensors."""
        return torch.equal(self.least(tensor), -self.least(-tensor))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, bit-identical in every process."""
        if self.size == 1:
            return tensor
        total = _to_backend(tensor).clone()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def least(self, tensor: Tensor) -> Tensor:
        """The elementwise minimum of all processes' tensors."""
        if self.size == 1:
            return tensor
        found = _to_backend(tensor).clone()
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return found.to(tensor.device)

    def gather(self, rows: Tensor, places: Tensor, n_rows: int) -> Tensor:
        """Combine the rows that the processes computed.

        Args:
            rows: This process's rows, (n, ...); shape and dtype are the same in all processes, except n.
            places: Their indices among all rows, (n,).
            n_rows: Number of rows of all processes together.
        Returns:
            All rows in order, (n_rows, ...), on the device of `rows`.
        """
        if self.size == 1:
            return rows
        whole = rows.new_zeros(n_rows, *rows.shape[1:])
        whole[places.to(rows.device)] = rows
        return self.sum(whole)

    def part(self, n: int) -> slice:
        """This process's share of n consecutive rows."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum_with_gradient(self, tensor: Tensor) -> Tensor:
        """Like `sum`, but differentiable: every process receives the sum of all processes' gradients."""
        if self.size == 1:
            return tensor
        total: Tensor = _Sum.apply(tensor, self)  # type: ignore[no-untyped-call]
        return total

    def whole(self, part: Tensor, n: int) -> Tensor:
        """All n rows, of which every process holds its `part`; every process must compute the same loss from them.

        Each process receives the gradient of its own rows, counted once.
        """
        if self.size == 1:
            return part
        rows: Tensor = _Whole.apply(part, self, n)  # type: ignore[no-untyped-call]
        return rows

    def sum_gradients(self, leaves: Iterable[Tensor]) -> None:
        """Sum the gradients of all processes; leaves without a gradient, which must be the same in all, are skipped."""
        for leaf in leaves:
            if self.size > 1 and leaf.grad is not None:
                leaf.grad = self.sum(leaf.grad)


ALONE = Team()


def launched() -> bool:
    """Whether this process is one of several that `accelerate launch` or `torchrun` started."""
    return _from_environment("WORLD_SIZE", 1, 1) > 1


def _from_environment(name: str, default: int, least: int) -> int:
    """A whole number that the launcher set in the environment.

    Raises:
        InputError: it is not a whole number of at least `least`.
    """
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or len(text) > 6 or int(text) < least:
        raise InputError(
            f"the environment variable {name} is {text!r:.100}, expected a whole number, at least {least}; "
            "start the processes with torchrun or accelerate launch, or unset it"
        )
    return int(text)


def join(device: torch.device | str = "cpu") -> tuple[Team, torch.device]:
    """Join the other processes of this launch; a process that was started alone is a team of one.

    `torch.distributed` is used if it has been set up; otherwise `accelerate` sets it up.

    Args:
        device: Where to compute. "cuda" becomes this process's own device.
    Returns:
        The team, and the device for this process.
    Raises:
        InputError: the device cannot be used here; or there are several processes, and `accelerate` is not installed or
            a launcher's environment variable is not a number.
    """
    device = usable_device(device)
    if not launched() and not (dist.is_available() and dist.is_initialized()):
        return ALONE, device
    if not dist.is_initialized():
        try:
            accelerate: Any = importlib.import_module("accelerate")
        except ImportError as error:
            raise InputError(
                "several processes were launched, which needs accelerate: pip install 'pnc[distributed]'"
            ) from error
        try:
            accelerate.PartialState(cpu=device.type == "cpu")
        except (ValueError, KeyError, RuntimeError) as error:
            raise InputError(
                f"the processes cannot connect: {error}; start them with torchrun or accelerate launch"
            ) from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", _from_environment("LOCAL_RANK", 0, 0))
        torch.cuda.set_device(device)
    return Team(dist.get_rank(), dist.get_world_size()), device


def launched_precision() -> Literal["float32", "bfloat16"]:
    """The precision that `accelerate launch --mixed_precision` or accelerate's configuration sets; float32 by default.

    Raises:
        InputError: it is neither "no" nor "bf16".
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by its launcher
    if asked not in ("no", "bf16"):
        raise InputError(
            f"mixed_precision: accelerate was launched with {asked!r}, which needs loss scaling; launch with "
            "--mixed_precision bf16 or no"
        )
    return "bfloat16" if asked == "bf16" else "float32"


@contextmanager
def joined(device: torch.device | str = "cpu") -> Iterator[tuple[Team, torch.device]]:
    """Like `join`, for the length of a block; a process group that was set up here is destroyed at its end.

    >>> with joined("cpu") as (team, device):
    ...     print(team, device)
    Team(rank=0, size=1) cpu
    """
    was_set_up = dist.is_available() and dist.is_initialized()
    try:
        yield join(device)
    finally:
        if not was_set_up and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _to_backend(tensor: Tensor) -> Tensor:
    """The tensor on the device that the backend exchanges tensors on: the GPU for NCCL."""
    return tensor.detach().cuda() if dist.get_backend() == "nccl" else tensor.detach().cpu()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return team.sum(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.team.sum(gradient), None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, team: Team, n: int) -> Tensor:
        ctx.place = team.part(n)
        return team.gather(part, torch.arange(n)[ctx.place], n)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.place], None, None
