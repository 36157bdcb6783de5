"""Several processes that make one clone together: who does what, and how results are put together.

Every process is called with the same arguments and goes through the same steps. Batches of the support are dealt out in
turn; sums and features are then exchanged, and what follows from them is computed by every process for itself.
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
    """The processes that share a job, seen by one of them.

    Attributes:
        rank: Number of this process.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and the screen."""
        return self.rank == 0

    def is_mine(self, number: int) -> bool:
        """Whether this process takes piece `number` of the work."""
        return number % self.size == self.rank

    def agree(self, tensor: Tensor) -> bool:
        """Whether all processes have the same numbers."""
        return torch.equal(self.least(tensor), -self.least(-tensor))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, the same to the bit for each."""
        if self.size == 1:
            return tensor
        total = _to_backend(tensor).clone()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def least(self, tensor: Tensor) -> Tensor:
        """The smallest of all processes' tensors, place by place."""
        if self.size == 1:
            return tensor
        found = _to_backend(tensor).clone()
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return found.to(tensor.device)

    def gather(self, rows: Tensor, places: Tensor, n_rows: int) -> Tensor:
        """Put together the rows that each process made.

        Args:
            rows: This process's, (n, ...); of one shape and dtype in all processes but for n.
            places: Where they belong, (n,).
            n_rows: How many all processes have together.
        Returns:
            All rows in their places, (n_rows, ...), on the device of `rows`.
        """
        if self.size == 1:
            return rows
        whole = rows.new_zeros(n_rows, *rows.shape[1:])
        whole[places.to(rows.device)] = rows
        return self.sum(whole)

    def part(self, n: int) -> slice:
        """This process's part of n rows that lie in a row."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum_with_gradient(self, tensor: Tensor) -> Tensor:
        """As `sum`; the gradient of what any process makes of it comes back to every process."""
        if self.size == 1:
            return tensor
        total: Tensor = _Sum.apply(tensor, self)  # type: ignore[no-untyped-call]
        return total

    def whole(self, part: Tensor, n: int) -> Tensor:
        """All n rows, of which every process has its `part`; each is to make the same loss of them.

        The gradient for this process's own rows comes back to it, once.
        """
        if self.size == 1:
            return part
        rows: Tensor = _Whole.apply(part, self, n)  # type: ignore[no-untyped-call]
        return rows

    def sum_gradients(self, leaves: Iterable[Tensor]) -> None:
        """Put the gradients of all processes' parts together; a leaf without any is passed over, in all of them."""
        for leaf in leaves:
            if self.size > 1 and leaf.grad is not None:
                leaf.grad = self.sum(leaf.grad)


ALONE = Team()


def launched() -> bool:
    """Whether this process is one of several that `accelerate launch` or `torchrun` started."""
    return _from_environment("WORLD_SIZE", 1, 1) > 1


def _from_environment(name: str, default: int, least: int) -> int:
    """A whole number that launchers set.

    Raises:
        InputError: it is none.
    """
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or len(text) > 6 or int(text) < least:
        raise InputError(
            f"the environment variable {name} is {text!r:.100}, expected a whole number, at least {least}; "
            "start the processes with torchrun or accelerate launch, or unset it"
        )
    return int(text)


def join(device: torch.device | str = "cpu") -> tuple[Team, torch.device]:
    """Meet the other processes of this launch; in a process that was started alone there are none.

    Where `torch.distributed` has been set up already, that is what is used; otherwise `accelerate` sets it up.

    Args:
        device: Where to compute. "cuda" becomes the device of this process's own.
    Returns:
        The team, and the device for this process.
    Raises:
        InputError: the device cannot be used here; there are several processes, and `accelerate` is not installed, or
            what they were launched with is no number.
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
                f"the processes cannot meet: {error}; start them with torchrun or accelerate launch"
            ) from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", _from_environment("LOCAL_RANK", 0, 0))
        torch.cuda.set_device(device)
    return Team(dist.get_rank(), dist.get_world_size()), device


def launched_precision() -> Literal["float32", "bfloat16"]:
    """What `accelerate launch --mixed_precision` or accelerate's own configuration asks for; float32 by default.

    Raises:
        InputError: it is another than bf16.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # that is how its launcher hands it on
    if asked not in ("no", "bf16"):
        raise InputError(
            f"mixed_precision: accelerate was launched with {asked!r}, which needs losses scaled; launch with "
            "--mixed_precision bf16 or no"
        )
    return "bfloat16" if asked == "bf16" else "float32"


@contextmanager
def joined(device: torch.device | str = "cpu") -> Iterator[tuple[Team, torch.device]]:
    """As `join`, for the length of a block; what was not set up before is parted from at its end."""
    there = dist.is_available() and dist.is_initialized()
    try:
        yield join(device)
    finally:
        if not there and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _to_backend(tensor: Tensor) -> Tensor:
    """The tensor where the processes exchange tensors: on the GPU if they do so over NCCL."""
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
