"""Deltas: what tuning changed of a part's parameters, rounded to few bits, and the weights that come of it.

A clone that was tuned runs on weights that are rounded already: merging is element by element, so that whoever reads
the file gets the same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from pnc.foundation.errors import MismatchError

CODE_BITS = 6
"""Of a weight's delta, sign included; see docs/method.md for what fewer lose."""
_LARGEST = 2 ** (CODE_BITS - 1) - 1
HEADER_BYTES = 400
"""What naming the tensors takes, at most."""
_PACK, _PACKED = 4, 3
"""Codes that are packed together, and the bytes that they take."""


@dataclass(frozen=True, eq=False)
class Deltas:
    """Changes of a part's parameters, flat, in the order of its parameters; a kind that is not there is empty.

    Attributes:
        codes: Of all weights of two dims and more, `CODE_BITS` each, packed, (n bytes,), uint8.
        scales: One for each output channel of these weights, (n,), float32: a weight changes by code * scale.
        left: Of these weights in place of codes, (n,), float16: factors (C_out, rank).
        right: Likewise, (rank, C_in * k * k).
        rank: Of both factors, (1,), int32, or empty; smaller where a weight has fewer rows or columns.
        shifts: Of all other parameters, (n,), float16.
    """

    codes: Tensor
    scales: Tensor
    left: Tensor
    right: Tensor
    rank: Tensor
    shifts: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that are not empty, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor.numel()}

    @property
    def n_bytes(self) -> int:
        """What they take in a file."""
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
    """Deltas with these tensors, and nothing else."""
    return Deltas(**{name: tensors.get(name, torch.empty(0, dtype=dtype)) for name, dtype in DTYPES.items()})


def deltas_in(tensors: Mapping[str, Tensor], prefix: str) -> Deltas | None:
    """The deltas among a file's tensors, whose names begin with a prefix; None where there are none."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return deltas_of(own) if own else None


def rounded_deltas(part: nn.Module, tuned: Mapping[str, Tensor]) -> Deltas:
    """Deltas from a part to tuned values of its parameters, weights rounded channel by channel.

    Args:
        part: With its parameters as they were.
        tuned: All of them as they are to be, by name.
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
    """Deltas of low rank.

    Args:
        part: With its parameters as they were.
        factors: For each weight of two dims and more: (C_out, r) and (r, C_in * k * k), r as `rank_of` says.
        tuned: All other parameters as they are to be, by name.
        rank: Of the factors.
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
    """What deltas of a part take in a file: of low rank, or, with None, of all weights."""
    weights = [weight for _, weight in _weights(part)]
    n_bytes: int = HEADER_BYTES + 2 * sum(p.numel() for p in part.parameters() if p.dim() < 2)
    if rank is None:
        n_values = sum(weight.numel() for weight in weights)
        return n_bytes + -(-n_values // _PACK) * _PACKED + 4 * sum(map(len, weights))
    return n_bytes + 2 * sum(rank_of(weight, rank) * sum(weight.flatten(1).shape) for weight in weights)


def rank_of(weight: Tensor, rank: int) -> int:
    """The rank that a weight's delta has where `rank` is asked for."""
    rows = weight.flatten(1)
    return min(rank, rows.shape[0], rows.shape[1])


@torch.no_grad()
def merge(part: nn.Module, deltas: Deltas, path: str = "deltas") -> None:
    """Change a part's parameters by deltas, in place: on every machine to the same bits.

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
            for place in range(rank):  # a matrix product would sum in another order elsewhere
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
        MismatchError: the message says what there is too much or too little of.
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
            "changes of two kinds, or half of one,"
            if wrong is None
            else f"{len(there[wrong])} {wrong}, {wanted[wrong]} are needed,"
        )
        raise MismatchError(f"{path}: {what} for the source's part; load the file with the source it was made from")


def _weights(part: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in part.named_parameters() if parameter.dim() >= 2]


def _joined(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces) if pieces else torch.empty(0)


def _packed(codes: Tensor) -> Tensor:
    """Codes (n,) in [-31, 31] as bytes, four codes in three of them."""
    if not len(codes):
        return torch.empty(0, dtype=torch.uint8)
    padded = torch.cat([codes, codes.new_zeros(-len(codes) % _PACK)]).int() & (2**CODE_BITS - 1)
    one, two, three, four = padded.reshape(-1, _PACK).unbind(1)
    whole = one | two << 6 | three << 12 | four << 18
    return torch.stack([whole & 255, whole >> 8 & 255, whole >> 16], 1).to(torch.uint8).flatten()


def _unpacked(packed: Tensor) -> Tensor:
    """The codes again, int8, with up to three zeros behind them."""
    if not len(packed):
        return packed.to(torch.int8)
    low, middle, high = packed.cpu().int().reshape(-1, _PACKED).unbind(1)
    whole = low | middle << 8 | high << 16
    places = [whole >> CODE_BITS * place & (2**CODE_BITS - 1) for place in range(_PACK)]
    codes = torch.stack(places, 1).flatten()
    signed: Tensor = codes - (codes > _LARGEST) * 2**CODE_BITS
    return signed.to(torch.int8)
