"""Size of a clone's file, estimated before the clone is made."""

from torch import nn

from pnc.clones.adapter import Adapter
from pnc.clones.deltas import delta_bytes
from pnc.foundation.errors import InputError
from pnc.graph.batch_norm_means import last_norm
from pnc.method.held_out import features_seen
from pnc.method.task import CloneTask


class FileTooLarge(InputError):
    """The file of a part is estimated to be larger than `max_bytes`."""


DIGEST_BYTES = 16
"""Bytes of the fingerprint of one tensor."""
FACTS_BYTES = 3000
"""Upper bound on the bytes of the other metadata."""
NAME_BYTES = 100
"""Bytes of a tensor's name, type and offsets."""


def thin_bytes(task: CloneTask, adapter: Adapter) -> int:
    """Upper bound on the bytes of a thin file at full density: adapter, head, fingerprints and the rest."""
    n_features, n_new = task.source.head.features.n_channels, len(task.new_classes)
    n_head = 4 * n_new * (n_features + 1)
    if task.has_base or last_norm(task.target.recording) is not None:  # discriminants in half precision
        n_classes = task.n_base + n_new
        n_head += n_classes * (2 * (features_seen(task).n_channels + n_features) + 4)
    n_operations = sum(
        len(one) + 1 for network in (task.source, task.target) for one in network.forward_print.operations
    )
    n_tensors = sum(len(network.model.state_dict()) for network in (task.source, task.target))
    n_names = 2 * sum(8 + 6 * len(name) for name in (*task.target.classes, *task.new_classes))  # a clone's name too
    return 4 * adapter.n_params + n_head + DIGEST_BYTES * n_tensors + n_operations + n_names + FACTS_BYTES


def statistics_bytes(part: nn.Module) -> int:
    """Upper bound on the bytes that a part's own statistics add to a thin file; it has them if channels are removed."""
    return sum(4 * buffer.numel() + NAME_BYTES for buffer in part.buffers())


def tuned_bytes(task: CloneTask, adapter: Adapter, part: nn.Module, rank: int | None) -> int:
    """Upper bound on the bytes of a thin file of a tuned part: with low-rank deltas, or with None codes for all."""
    return thin_bytes(task, adapter) + statistics_bytes(part) + delta_bytes(part, rank)
