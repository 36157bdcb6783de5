"""Gates: learns by gradient which channels of a segment to keep, and norms that compensate for the others.

Every unit has a rank. At each step the best units within the budget are kept, and the gradient of the loss with respect
to a unit's gate passes straight through to its rank (Bengio et al., 2013, arXiv:1308.3432). The budget shrinks step by
step, so that it is met in the end without a penalty.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from pnc.channels.compaction import own_copy
from pnc.channels.mac_budget import Costs, best_within
from pnc.channels.module_inlining import opened
from pnc.foundation.process_team import ALONE, Team
from pnc.method.localization.channel_scores import Gated, by_space
from pnc.method.localization.norms import LEARNING_RATE, Batch, optimizer_for, training_norms

GATES_LEARNING_RATE = 0.01
SHRINKING = 0.3
"""Share of the steps after which the budget stops shrinking."""


def learn_gates(
    segment: fx.GraphModule,
    costs: Costs,
    start: Mapping[str, Tensor],
    density: float,
    batches: Iterable[Batch],
    n_steps: int,
    *,
    tune: bool,
    team: Team = ALONE,
) -> tuple[dict[str, Tensor], fx.GraphModule]:
    """Learn ranks for `masks_within`; the segment itself is not changed.

    Args:
        segment: The part of the source; it has at least one channel space.
        costs: Its costs.
        start: Space name -> ranks (size,) to start from; learning moves them by about one.
        density: Share of the prunable MACs to keep.
        batches: At least `n_steps` batches.
        n_steps: Steps of Adam.
        tune: Learn scales and shifts of the norms at the same time.
        team: Processes that share every batch; all get the same arguments.
    Returns:
        Space name -> ranks (size,), float64; and a copy of the segment with the learned norms.
    """
    spaces = costs.spaces
    gated = own_copy(opened(segment))
    gates = Gated(gated, spaces)
    # Ranks are on the CPU, where the budget is counted.
    ranks = torch.cat([start[space.name].detach().float().cpu() for space in spaces.spaces]).requires_grad_(True)
    with training_norms(gated, team) as norms:
        groups: list[dict[str, object]] = [{"params": [ranks], "lr": GATES_LEARNING_RATE}]
        if tune and norms:
            groups.append({"params": norms, "lr": LEARNING_RATE})
        optimizer, decay = optimizer_for(groups, n_steps)
        for (x, loss), step in zip(batches, range(n_steps), strict=False):
            shrunk = min(1.0, (step + 1) / (SHRINKING * n_steps))
            with torch.enable_grad():
                optimizer.zero_grad()
                factors = _straight_through(costs, ranks, costs.bound(1 - (1 - density) * shrunk))
                outputs = gates.run_with(x[team.part(len(x))], factors.to(x.device, x.dtype))
                loss(team.whole(outputs, len(x))).backward()
            team.sum_gradients([ranks, *norms])
            optimizer.step()
            decay.step()
    return by_space(spaces, ranks.detach().double()), gated


def _straight_through(costs: Costs, ranks: Tensor, n_macs: int) -> Tensor:
    """Return 1 for the units kept within a bound and 0 for the others, (n_units,), with the gradient of a sigmoid."""
    kept = best_within(costs, by_space(costs.spaces, ranks.detach()), n_macs)
    lowest = ranks.detach()[kept].min()
    highest = ranks.detach()[~kept].max() if not bool(kept.all()) else lowest
    soft = torch.sigmoid(ranks - (lowest + highest) / 2)
    return kept.to(ranks.dtype) + soft - soft.detach()
