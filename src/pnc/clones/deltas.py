"""Deltas: the changes that tuning made to a part's parameters, rounded to few bits, and how to merge them.

A tuned clone already runs on the rounded weights, and merging works element by element, so that a loaded clone has the
same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from pnc.foundation.errors import MismatchError

CODE_BITS = 6
"""Bits of a weight's delta, sign included; docs/method.md says what fewer bits cost."""
_LARGEST = 2 ** (CODE_BITS - 1) - 1
HEADER_BYTES = 400
"""Bound on what the names of the tensors take in the file."""
_PACK, _PACKED = 4, 3
"""Four codes are packed into three bytes."""


@dataclass(frozen=True, eq=False)
class Deltas:
    """Changes of a part's parameters, each kind flat and in the order of the parameters; unused kinds are empty.

    Attributes:
        codes: Changes of all weights with at least two dims, packed, `CODE_BITS` each, (n bytes,), uint8.
        scales: One for each output channel of these weights, (n,), float32: a weight changes by code * scale.
        left: In place of codes, left factors (C_out, rank) of the changes, (n,), float16.
        right: The right factors (rank, C_in * k * k), (n,), float16.
        rank: Rank of the factors, (1,), int32, or empty; lower for a weight with fewer rows or columns.
        shifts: Changes of all other parameters, (n,), float16.
    """

    codes: Tensor
    scales: Tensor
    left: Tensor
    right: Tensor
    rank: Tensor
    shifts: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are not empty, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor.numel()}

    @property
    def n_bytes(self) -> int:
        """Their size in a file, in bytes, without names."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


DTYPES = {
    "codes": torch.uint8,
    "scales": torch.float32,
    "left": torch.float16,
    "right": torch.float16,
    "rank": torch.int32,
    "shifts": torch.float16,
}
assert [field.name for field in fields(Deltas)] == list(DTYPES)


def deltas_of(tensors: Mapping[str, Tensor]) -> Deltas:
    """Make deltas from these tensors; the others are empty."""
    return Deltas(**{name: tensors.get(name, torch.empty(0, dtype=dtype)) for name, dtype in DTYPES.items()})


def deltas_in(tensors: Mapping[str, Tensor], prefix: str) -> Deltas | None:
    """Make deltas from those of a file's tensors whose names begin with a prefix; None if there are none."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return deltas_of(own) if own else None


def rounded_deltas(part: nn.Module, tuned: Mapping[str, Tensor]) -> Deltas:
    """Compute deltas from a part to tuned values of its parameters, rounding weights channel by channel.

    Args:
        part: The part before tuning.
        tuned: All its parameters after tuning, by name.
    """
    codes, scales, shifts = [], [], []
    for name, before in part.named_parameters():
        change = (tuned[name].detach() - before.detach()).float().cpu()
        if before.dim() < 2:
            shifts.append(change.half().flatten())
            continue
        rows = change.flatten(1)
        scale = rows.abs().amax(1) / _LARGEST
        codes.append((rows / scale.clamp_min(1e-30)[:, None]).round().to(torch.int8).flatten())
        scales.append(scale)
    return deltas_of({"codes": _packed(_joined(codes)), "scales": _joined(scales), "shifts": _joined(shifts)})


def low_rank_deltas(
    part: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], tuned: Mapping[str, Tensor], rank: int
) -> Deltas:
    """Compute deltas of low rank.

    Args:
        part: The part before tuning.
        factors: For each weight with at least two dims: (C_out, r) and (r, C_in * k * k), with r from `rank_of`.
        tuned: All other parameters after tuning, by name.
        rank: Rank of the factors.
    """
    pairs = [factors[name] for name, _ in _weights(part)]
    shifts = [
        (tuned[name].detach() - before.detach()).half().cpu().flatten()
        for name, before in part.named_parameters()
        if before.dim() < 2
    ]
    left, right = (_joined([pair[side].detach().half().cpu().flatten() for pair in pairs]) for side in (0, 1))
    return deltas_of(
        {"left": left, "right": right, "rank": torch.tensor([rank], dtype=torch.int32), "shifts": _joined(shifts)}
    )


def delta_bytes(part: nn.Module, rank: int | None = None) -> int:
    """Bytes that a part's deltas take in a file: low-rank ones, or with None codes for all weights."""
    weights = [weight for _, weight in _weights(part)]
    n_bytes: int = HEADER_BYTES + 2 * sum(p.numel() for p in part.parameters() if p.dim() < 2)
    if rank is None:
        n_values = sum(weight.numel() for weight in weights)
        return n_bytes + -(-n_values // _PACK) * _PACKED + 4 * sum(map(len, weights))
    return n_bytes + 2 * sum(rank_of(weight, rank) * sum(weight.flatten(1).shape) for weight in weights)


def rank_of(weight: Tensor, rank: int) -> int:
    """The rank of a weight's delta: `rank`, or less if the weight has fewer rows or columns."""
    rows = weight.flatten(1)
    return min(rank, rows.shape[0], rows.shape[1])


@torch.no_grad()
def merge(part: nn.Module, deltas: Deltas, path: str = "deltas") -> None:
    """Add deltas to a part's parameters, in place, with the same bits on every machine.

    Raises:
        MismatchError: the deltas are not for a part of this architecture.
    """
    weights, others = _weights(part), [p for _, p in part.named_parameters() if p.dim() < 2]
    check_fit(part, deltas, path)
    codes, scales = _unpacked(deltas.codes), deltas.scales
    left, right, shifts = deltas.left.float(), deltas.right.float(), deltas.shifts.float()
    for _, weight in weights:
        rows = weight.flatten(1)
        if len(codes):
            own, codes = codes[: rows.numel()], codes[rows.numel() :]
            scale, scales = scales[: len(rows)], scales[len(rows) :]
            change = own.reshape(rows.shape).float() * scale[:, None]
        elif len(left):
            rank = rank_of(weight, int(deltas.rank))
            one, left = left[: len(rows) * rank].reshape(-1, rank), left[len(rows) * rank :]
            two, right = right[: rank * rows.shape[1]].reshape(rank, -1), right[rank * rows.shape[1] :]
            change = torch.zeros(rows.shape)
            for place in range(rank):  # the order of sums in a matrix product depends on the machine
                change += one[:, place : place + 1] * two[place]
        else:
            break
        weight.add_(change.reshape(weight.shape).to(weight.device, weight.dtype))
    for parameter in others if len(shifts) else ():
        own, shifts = shifts[: parameter.numel()], shifts[parameter.numel() :]
        parameter.add_(own.reshape(parameter.shape).to(parameter.device, parameter.dtype))


def check_fit(part: nn.Module, deltas: Deltas, path: str = "deltas") -> None:
    """Refuse deltas that are not for a part of this architecture.

    Raises:
        MismatchError: the message names the tensor that does not fit.
    """
    weights, others = [weight for _, weight in _weights(part)], [p for p in part.parameters() if p.dim() < 2]
    n_values = sum(weight.numel() for weight in weights)
    n_rows = sum(len(weight) for weight in weights)
    rank = int(deltas.rank) if len(deltas.rank) == 1 else 0
    ranks = [(weight.flatten(1).shape, rank_of(weight, rank)) for weight in weights]
    wanted = {
        "codes": -(-n_values // _PACK) * _PACKED,
        "scales": n_rows,
        "left": sum(rows * r for (rows, _), r in ranks),
        "right": sum(columns * r for (_, columns), r in ranks),
        "rank": 1,
        "shifts": sum(parameter.numel() for parameter in others),
    }
    there = deltas.tensors
    kinds = {"codes", "scales"}, {"left", "right", "rank"}
    whole = all(not there.keys() & kind or kind <= there.keys() for kind in kinds)
    whole = whole and not (there.keys() & kinds[0] and there.keys() & kinds[1]) and rank >= 0
    wrong = next((name for name, tensor in there.items() if len(tensor) != wanted[name]), None)
    if wrong is not None or not whole:
        what = (
            "its deltas are of two kinds, or incomplete"
            if wrong is None
            else f"its deltas have {len(there[wrong])} {wrong}, the source's part needs {wanted[wrong]}"
        )
        raise MismatchError(f"{path}: {what}; load the file with the source it was made from")


def _weights(part: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in part.named_parameters() if parameter.dim() >= 2]


def _joined(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces) if pieces else torch.empty(0)


def _packed(codes: Tensor) -> Tensor:
    """Pack codes (n,) in [-31, 31], four in three bytes."""
    if not len(codes):
        return torch.empty(0, dtype=torch.uint8)
    padded = torch.cat([codes, codes.new_zeros(-len(codes) % _PACK)]).int() & (2**CODE_BITS - 1)
    one, two, three, four = padded.reshape(-1, _PACK).unbind(1)
    whole = one | two << 6 | three << 12 | four << 18
    return torch.stack([whole & 255, whole >> 8 & 255, whole >> 16], 1).to(torch.uint8).flatten()


def _unpacked(packed: Tensor) -> Tensor:
    """Unpack codes, int8, with up to three zeros at the end."""
    if not len(packed):
        return packed.to(torch.int8)
    low, middle, high = packed.cpu().int().reshape(-1, _PACKED).unbind(1)
    whole = low | middle << 8 | high << 16
    places = [whole >> CODE_BITS * place & (2**CODE_BITS - 1) for place in range(_PACK)]
    codes = torch.stack(places, 1).flatten()
    signed: Tensor = codes - (codes > _LARGEST) * 2**CODE_BITS
    return signed.to(torch.int8)
