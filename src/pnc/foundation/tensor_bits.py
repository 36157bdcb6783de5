"""Tensors as bits: comparison, bytes, names of dtypes, digests."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
"""Dtypes that files may hold, and that fingerprints can name if they differ."""

_BYTES_FOR_THREADS = 1 << 24


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits; unlike `torch.equal`, a NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(as_bytes(a), as_bytes(b.to(a.device)))


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def value_digests(tensors: Sequence[Tensor]) -> list[str]:
    """SHA-256 of each tensor's bytes, 64 hex digits: little-endian, row by row whatever the memory format.

    Many bytes are hashed in several threads, as hashing releases Python's lock.
    """
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) < _BYTES_FOR_THREADS:
        return [_value_digest(tensor) for tensor in tensors]
    n_threads = min(8, os.cpu_count() or 1)
    largest_first = sorted(
        range(len(tensors)), key=lambda place: -tensors[place].numel() * tensors[place].element_size()
    )
    shares = [largest_first[first::n_threads] for first in range(n_threads)]
    digests = [""] * len(tensors)

    def digest(share: Sequence[int]) -> None:
        for place in share:
            digests[place] = _value_digest(tensors[place])

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(digest, shares))  # one task per tensor would cost more than hashing most tensors
    return digests


def _value_digest(tensor: Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor.cpu()).numpy().data).hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in index order, (n_bytes,) uint8; shares its memory if possible."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
