"""Two networks of one backbone: a public ImageNet classifier, and copies of it that are fine-tuned to other classes."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.bench.public_network import SMALL_BATCH
from pnc.bench.rivals.linear_probe import regression
from pnc.bench.setting import Setting
from pnc.channels.compaction import own_copy
from pnc.clones.position_grids import pool
from pnc.data.image_set import ImageSet, class_subset, hold_back, images_as_float, relabel, sample_per_class
from pnc.foundation.errors import InputError
from pnc.foundation.tensor_bits import same_bits, value_digests
from pnc.foundation.tensor_files import read_tensors, write_tensors
from pnc.graph.candidate_cuts import candidate_cuts
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import LOGITS, CutPoint, extract
from pnc.graph.recording import Recording, record
from pnc.method.task import Progress
from pnc.models.model_specs import LoadedModel

DATA, N_BASE, N_NEW, N_TUNED = "Tiny-ImageNet", 50, 10, 80
"""Images, classes of a target, classes that it shall gain, and images of each of its own that tune it."""
PENALTY = 0.01
"""Of the logistic regression that is the new head: `regression` takes it, on standardized features."""
BATCH = 64


@dataclass(frozen=True)
class FineTuning:
    """How a network is fine-tuned after it was given a new head.

    Attributes:
        share: Multiply-accumulates that are trained, as a share of the network's; 0 trains the new head alone.
        epochs: Passes over the images.
        learning_rate: Highest rate of AdamW; it rises and falls.
    """

    share: float
    epochs: int = 0
    learning_rate: float = 0.0


WAYS: Mapping[str, FineTuning] = {
    "head": FineTuning(0.0),
    "last third": FineTuning(1 / 3, 4, 3e-4),
    "all": FineTuning(1.0, 1, 1e-4),
}
"""Ways to fine-tune. BatchNorm keeps the statistics of ImageNet in all of them."""


def pair(
    public: LoadedModel, images: tuple[ImageSet, ImageSet], way: str, folder: Path, progress: Progress | None = None
) -> Setting:
    """Fine-tune a copy of the public network to the first classes of some images; it shall gain the next ones.

    Args:
        public: The source.
        images: For training and for testing, with the public network's names of classes.
        way: Name of one of `WAYS`.
        folder: Where what was trained is kept.
        progress: As in `fine_tuned`.
    Returns:
        Both networks with the images that did not tune the target; the sizes of the support are not set.
    """
    base = images[0].classes[:N_BASE]
    new = [name for name in images[0].classes[N_BASE:] if name in public.classes][:N_NEW]
    own = class_subset(images[0], base)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"backbone_{way.replace(' ', '_')}.safetensors"
    target = fine_tuned(public, sample_per_class(own, N_TUNED, "first"), way, path, progress)
    _, unseen = hold_back(own, min(own.counts().values()) - N_TUNED)
    parts = [relabel(part, [*base, *new]) for part in (unseen, class_subset(images[0], new))]
    train = ImageSet(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]), parts[0].classes)
    return Setting(public, target, train, class_subset(images[1], train.classes), DATA, None, None, flip=False)


def fine_tuned(
    public: LoadedModel, images: ImageSet, way: str, path: Path, progress: Progress | None = None
) -> LoadedModel:
    """Return a copy of a network with a new head for the classes of some images, fine-tuned to them in one of `WAYS`.

    The head is a logistic regression on the network's features; from there the last layers, or all, are trained. What
    is not trained is run once.

    Args:
        public: The network; it is not changed.
        images: Training images.
        way: Name of one of `WAYS`.
        path: File, .safetensors, for the tensors that differ from the network's; if it holds those of the same images
            and recipe, they are read from it.
        progress: Called after every batch.
    Raises:
        InputError: the network's last layer is not linear.
        FileFormatError: the file is damaged, or something else.
    """
    model = copy.deepcopy(public.module)
    example = images_as_float(images.images[:4])
    name = find_head(record(model, example)).module
    old = None if name is None else model.get_submodule(name)
    if name is None or not isinstance(old, nn.Linear):
        raise InputError("fine-tuning needs a network whose last layer is linear")
    model.set_submodule(name, nn.Linear(old.in_features, len(images.classes)))
    digests = value_digests([images.images, images.labels])
    identity = {"network": public.spec, "classes": list(images.classes), "images": digests, **vars(WAYS[way])}
    tensors, known = read_tensors(path) if path.exists() else ({}, {})
    if known == identity:
        model.load_state_dict(tensors, strict=False)
    else:
        _train(model, name, images, WAYS[way], progress)
        before = public.module.state_dict()
        changed = {key: value for key, value in model.state_dict().items() if not same_bits(value, before[key])}
        write_tensors(path, changed, identity)
    model.eval().requires_grad_(False)
    return LoadedModel(model, f"{public.spec}, tuned: {way}", images.classes, public.input_shape)


def _train(model: nn.Module, head: str, images: ImageSet, way: FineTuning, progress: Progress | None) -> None:
    """Give a network a head for the classes of some images, then train what is to be trained, in place."""
    recording = record(model, images_as_float(images.images[:4]))
    cuts = candidate_cuts(recording)
    features = find_head(recording).features
    n_macs = features.n_macs
    cut = [one for one in cuts if one.n_macs <= (1 - way.share) * n_macs][-1] if way.share else features
    inputs = images_as_float(images.images) if cut is cuts[0] else _outputs(recording, cut, images, progress)
    tail = own_copy(extract(recording, None if cut is cuts[0] else cut, [LOGITS]))
    layer = tail.get_submodule(head)
    assert isinstance(layer, nn.Linear)
    rows = inputs if cut is features else _outputs(recording, features, images, progress)
    _fit_head(layer, pool(rows, features), images.labels)
    if way.epochs:
        _descend(tail, inputs, images.labels, way, progress)
    model.load_state_dict(tail.state_dict(), strict=False)


@torch.no_grad()
def _outputs(recording: Recording, cut: CutPoint, images: ImageSet, progress: Progress | None) -> Tensor:
    """The network's tensors at a cut for all images, (N, ...)."""
    trunk, found = extract(recording, None, [cut]), []
    for batch in images.images.split(SMALL_BATCH):
        found.append(trunk(images_as_float(batch)))
        if progress is not None:
            progress("running frozen layers", min(len(found) * SMALL_BATCH, len(images)), len(images))
    return torch.cat(found)


def _fit_head(layer: nn.Linear, rows: Tensor, labels: Tensor) -> None:
    """Set a linear layer to the logistic regression on features (N, D)."""
    mean, scale = rows.double().mean(0), rows.double().std(0).clamp_min(1e-6)
    weights = torch.ones(len(rows), dtype=torch.float64)
    weight, bias = regression((rows.double() - mean) / scale, labels, weights, PENALTY)
    weight = weight / scale
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias - weight @ mean)


def _descend(tail: nn.Module, inputs: Tensor, labels: Tensor, way: FineTuning, progress: Progress | None) -> None:
    """Train the last part of a network by cross-entropy; mirror images are used if it takes images."""
    mirror = inputs.shape[1] <= 3
    generator = torch.Generator().manual_seed(0)
    tail.requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in its stubs
    optimizer = torch.optim.AdamW(tail.parameters(), lr=way.learning_rate, weight_decay=1e-2)
    n_steps = way.epochs * math.ceil(len(labels) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, way.learning_rate, total_steps=n_steps)
    done = 0
    for _ in range(way.epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            batch = inputs[rows]
            if mirror:
                flipped = torch.rand(len(rows), generator=generator) < 0.5
                batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
            loss = F.cross_entropy(tail(batch.contiguous(memory_format=torch.channels_last)), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if progress is not None:
                progress(f"fine-tuning, loss {loss.item():.2f}", done, n_steps)
