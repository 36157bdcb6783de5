"""Images of a support, kept in their own dtype: in memory up to a limit, in a temporary file beyond it."""

import math
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from pnc.foundation.errors import InputError

BLOCK_BYTES = 2**24
"""Single images are combined into blocks of about this size."""
GIB = 2**30
MAX_IMAGE = 1 << 24
"""Maximum number of values in an image whose shape comes from a file: more than 3x2048x2048."""
MEMORY = GIB
"""Default limit, in bytes, on the memory that a job uses for copies of a support's images; see `pnc.clone`."""


@dataclass(frozen=True)
class _Block:
    """Consecutive images: in `tensor`, or in the file from byte `offset` on."""

    start: int
    size: int
    dtype: torch.dtype
    tensor: Tensor | None
    offset: int = 0


class ImageStore:
    """Images of one shape, read by number; images that do not fit into memory go to a temporary file.

    uint8 and half-precision images are kept in their dtype, all others as float32. The file has no name if the system
    allows that, is not mapped into memory, and is removed with the store.

    Args:
        memory: Maximum size, in bytes, of the images copied into memory.
        argument: What messages call the images.
    """

    def __init__(self, memory: int, argument: str = "support") -> None:
        self._memory, self._argument = memory, argument
        self._blocks: list[_Block] = []
        self._pending: list[Tensor] = []
        self._shape: tuple[int, int, int] | None = None
        self._n_images = self._n_copied = self._n_written = 0
        self._low, self._high = math.inf, -math.inf
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return self._n_images

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, (C, H, W)."""
        assert self._shape is not None, "an empty store has no shape"
        return self._shape

    @property
    def value_range(self) -> tuple[float, float]:
        """The smallest and the largest value of all floating-point images; (0, 1) if there are none."""
        return (0.0, 1.0) if self._low > self._high else (self._low, self._high)

    def keep(self, images: Tensor) -> None:
        """Add images (B, C, H, W) that are in memory anyway: uint8 and float32 are not copied.

        Raises:
            InputError: they are not images, not finite, or of another shape than earlier ones.
        """
        images = self._checked(images)
        self._flush()
        self._append(images)

    def add(self, images: Tensor) -> None:
        """Add a copy of images (B, C, H, W).

        Raises:
            InputError: as `keep`.
        """
        images = self._checked(images)
        if self._pending and self._pending[0].dtype != images.dtype:
            self._flush()
        self._pending.append(images)
        self._n_images += len(images)
        if sum(_n_bytes(one) for one in self._pending) >= min(BLOCK_BYTES, self._memory):
            self._flush()

    def read(self, rows: Tensor) -> Tensor:
        """The images of these numbers, (B, C, H, W), float32; uint8 images are divided by 255."""
        self._flush()
        out = torch.empty(len(rows), *self.shape)
        of_block = torch.searchsorted(torch.tensor([block.start for block in self._blocks]), rows, right=True) - 1
        for index in of_block.unique().tolist():
            block, places = self._blocks[index], of_block == index
            found = self._read_block(block, rows[places] - block.start)
            out[places] = found.float().div_(255) if found.dtype == torch.uint8 else found.float()
        return out

    def close(self) -> None:
        """Remove the temporary file, if there is one, with its images."""
        if self._file is not None:
            self._file.close()

    def _checked(self, images: Tensor) -> Tensor:
        check_images(images, self._argument, self._n_images)
        shape = tuple(images.shape[1:])
        if self._shape is None:
            self._shape = shape[0], shape[1], shape[2]
        if shape != self._shape:
            raise InputError(
                f"{self._argument}: the images have several shapes, {self._shape} and, at index {self._n_images}, "
                f"{shape}; give all one shape"
            )
        if images.is_floating_point():
            low, high = images.aminmax()
            self._low, self._high = min(self._low, low.item()), max(self._high, high.item())
        small = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)
        return images.detach().cpu() if images.dtype in small else images.detach().cpu().float()

    def _flush(self) -> None:
        """Make one block of the pending images: in memory, or in the file if the limit is reached."""
        if not self._pending:
            return
        images = torch.cat(self._pending)
        self._pending, self._n_images = [], self._n_images - len(images)
        self._n_copied += _n_bytes(images)
        if self._n_copied > self._memory:
            images = self._append(images, self._write(images))
        else:
            self._append(images)

    def _append(self, images: Tensor, offset: int | None = None) -> Tensor:
        kept = images if offset is None else None
        self._blocks.append(_Block(self._n_images, len(images), images.dtype, kept, offset or 0))
        self._n_images += len(images)
        return images

    def _write(self, images: Tensor) -> int:
        """Append images to the file, and return the offset of the first one."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="pnc-", buffering=0)  # noqa: SIM115 - closed with the store
            weakref.finalize(self, self._file.close)
        self._file.seek(self._n_written)
        data, done = memoryview(_as_bytes(images)).cast("B"), 0
        while done < len(data):
            done += self._file.write(data[done:])
        offset, self._n_written = self._n_written, self._n_written + len(data)
        return offset

    def _read_block(self, block: _Block, rows: Tensor) -> Tensor:
        if block.tensor is not None:
            return block.tensor[rows]
        assert self._file is not None
        found = torch.empty(len(rows), *self.shape, dtype=block.dtype)
        n_bytes = _n_bytes(found[0])
        into = memoryview(_as_bytes(found)).cast("B")
        for place, row in enumerate(rows.tolist()):
            self._file.seek(block.offset + row * n_bytes)
            _read_into(self._file, into[place * n_bytes : (place + 1) * n_bytes])
        return found


def check_images(images: Tensor, argument: str, first: int = 0) -> None:
    """Check that `images` is a non-empty tensor (N, C, H, W) of uint8 or finite floating-point numbers.

    Args:
        images: Anything.
        argument: What messages call it.
        first: Number of the first image, for messages.
    Raises:
        InputError: it is not such a tensor.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape:
        came = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"{argument}: expected a non-empty tensor (N, C, H, W), got {came}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise InputError(f"{argument}: expected uint8 or floating point, got {images.dtype}; convert them first")
    if images.is_floating_point() and not images.isfinite().all():
        bad = (~images.flatten(1).isfinite().all(1)).nonzero().flatten()
        raise InputError(
            f"{argument}: {len(bad)} of {len(images)} hold NaN or infinity, first at index {first + bad[0].item()}; "
            "remove them"
        )


class Images:
    """A selection of a store's images, some of them mirrored; images are read on demand.

    Args:
        store: The store.
        rows: Numbers in the store, (N,).
        mirrored: Which images are mirrored, (N,) bool.
    """

    def __init__(self, store: ImageStore, rows: Tensor, mirrored: Tensor) -> None:
        self._store, self._rows, self._mirrored = store, rows, mirrored

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Some of the images, by number, bool mask or slice, (B, C, H, W), float32."""
        images, mirrored = self._store.read(self._rows[rows]), self._mirrored[rows]
        if mirrored.any():
            images[mirrored] = images[mirrored].flip(3)
        return images

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, (C, H, W)."""
        return self._store.shape

    @property
    def n_bytes(self) -> int:
        """Size of one image, as float32, in bytes."""
        channels, height, width = self.shape
        return 4 * channels * height * width

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in order, at most `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def select(self, rows: Tensor) -> "Images":
        """A selection of these images, by number or bool mask."""
        return Images(self._store, self._rows[rows], self._mirrored[rows])

    def close(self) -> None:
        """Close the store."""
        self._store.close()


def _n_bytes(images: Tensor) -> int:
    return images.numel() * images.element_size()


def _as_bytes(images: Tensor) -> Any:
    """The memory of a tensor as an array of bytes."""
    return images.contiguous().view(torch.uint8).numpy()


def _read_into(file: IO[bytes], into: memoryview) -> None:
    done = 0
    while done < len(into):
        got = file.readinto(into[done:])  # type: ignore[attr-defined]
        if not got:
            raise InputError("support: the temporary file with its images is truncated; is the disk full?")
        done += got


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Move images (B, C, H, W) to a device, in channels_last: narrow networks run a quarter faster on it.

    For a GPU they are pinned first, so that the copy is asynchronous.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    return images.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else images.to(device)
