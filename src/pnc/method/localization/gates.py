"""Gates: which channels of a segment to keep, learned by gradient, with the norms that make up for those that go.

Every unit has a rank. At each step the best ones within the budget are kept, and the gradient of the loss for switching
a unit reaches its rank straight through (Bengio et al., 2013, arXiv:1308.3432). The budget shrinks step by step, so
that it is met at the end without any penalty.
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
"""Share of the steps after which the budget is reached."""


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
    """Learn ranks for `masks_within`; the segment itself stays as it is.

    Args:
        segment: The part of the source that would be cloned; has at least one space.
        costs: Of this segment.
        start: Space name -> ranks (size,) to start from; learning moves them by about one.
        density: The share of the prunable MACs that is aimed at.
        batches: At least `n_steps` batches.
        n_steps: Steps of Adam.
        tune: Learn scales and shifts of the norms at the same time, as if they could follow.
        team: Processes that share every batch; all are given the same.
    Returns:
        Space name -> ranks (size,), float64; and a copy of the segment with the norms that were learned.
    """
    spaces = costs.spaces
    gated = own_copy(opened(segment))
    gates = Gated(gated, spaces)
    # Ranks are updated on the CPU, where the budget is counted.
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
    """1 for the units that are kept within a bound and 0 for the others, (n_units,), with a sigmoid's gradient."""
    kept = best_within(costs, by_space(costs.spaces, ranks.detach()), n_macs)
    lowest = ranks.detach()[kept].min()
    highest = ranks.detach()[~kept].max() if not bool(kept.all()) else lowest
    soft = torch.sigmoid(ranks - (lowest + highest) / 2)
    return kept.to(ranks.dtype) + soft - soft.detach()
