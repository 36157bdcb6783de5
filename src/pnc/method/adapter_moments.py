"""Moments of all pairs of cuts, gathered in one pass over the support; adapters are solved from them."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from pnc.clones.position_grids import pool
from pnc.data.image_store import to_device
from pnc.graph.cut_points import LOGITS, CutPoint, extract
from pnc.method.adapter_fitting import N_ROWS, AdapterFitter
from pnc.method.head_fitting import HeadSamples
from pnc.method.held_out import batches, features_seen, head_samples
from pnc.method.task import CloneTask, Progress

RANKED_IMAGES, RANKED_ROWS, RANKED_OUTPUTS = 100, 8_000, 64
"""Images, rows and channels used to rank pairs of cuts if the moments of all pairs would not fit into memory."""


def adapter_fitter(
    task: CloneTask,
    target_cuts: Sequence[CutPoint],
    source_cuts: Sequence[CutPoint],
    pairs: Sequence[tuple[CutPoint, CutPoint]] | None = None,
    n_rows: int = N_ROWS,
    n_outputs: int | None = None,
) -> AdapterFitter:
    """Make an empty fitter for these cuts."""
    generator = torch.Generator().manual_seed(task.seed)
    return AdapterFitter(target_cuts, source_cuts, len(task.samples.labels), generator, pairs, n_rows, n_outputs)


def ranked_pairs(
    task: CloneTask, target_cuts: Sequence[CutPoint], source_cuts: Sequence[CutPoint], progress: Progress | None
) -> dict[tuple[str, str], float]:
    """Estimate the adapter errors of all pairs, by names of the cuts, on a part of the support with two folds."""
    part = task.reduced(RANKED_IMAGES)
    samples = part.samples
    if samples.n_folds > 2:
        halves = (samples.folds >= samples.n_folds // 2).long()
        part = replace(part, samples=replace(samples, folds=halves))
    fitter = adapter_fitter(part, target_cuts, source_cuts, None, RANKED_ROWS, RANKED_OUTPUTS)
    gather_moments(part, fitter, target_cuts, source_cuts, "ranking cuts", progress)
    return {(t.name, s.name): fitter.error(t, s) for t in target_cuts for s in source_cuts}


def gather_moments(
    task: CloneTask,
    fitter: AdapterFitter,
    target_cuts: Sequence[CutPoint],
    source_cuts: Sequence[CutPoint],
    what: str,
    progress: Progress | None,
    *,
    keeps_samples: bool = False,
) -> HeadSamples | None:
    """Run the support through both networks and give the fitter the tensors at all cuts.

    At the first cut of each, such as the input, both networks have the same tensor: the source starts there.

    Returns:
        With `keeps_samples`, the samples to fit heads on behind the whole source from there on.
    """
    seen, own = features_seen(task), task.source.head.features
    target_taps = extract(task.target.recording, None, [*target_cuts, seen, LOGITS])
    source_taps = extract(task.source.recording, source_cuts[0], [*source_cuts, own])
    rows, kept = [], []
    done = 0
    for number, fold, place, images in batches(task, [*target_cuts, *source_cuts], what, progress, with_first=True):
        for _ in range(done, number):
            fitter.skip()
        done = number + 1
        with torch.no_grad(), task.autocast():
            here = to_device(images, task.target.device)
            *target_tensors, features, logits = target_taps(here)
            *source_tensors, own_features = source_taps(target_tensors[0])
        fitter.update(
            fold,
            {cut.name: tensor for cut, tensor in zip(target_cuts, target_tensors, strict=True)},
            {cut.name: tensor for cut, tensor in zip(source_cuts, source_tensors, strict=True)},
            counted=task.team.is_mine(number),
        )
        if keeps_samples and task.team.is_mine(number):
            columns = pool(features, seen), logits, pool(own_features, own)
            rows.append(torch.arange(place.start, place.stop))
            kept.append([column.float().cpu() for column in columns])
    fitter.share(task.team, task.samples.n_folds)
    if not keeps_samples:
        return None
    own_rows, n_rows = torch.cat(rows), len(task.samples.labels)
    return head_samples(task, *(task.team.gather(torch.cat(one), own_rows, n_rows) for one in zip(*kept, strict=True)))
