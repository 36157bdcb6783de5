"""Clones that were made apart, made to live together: a few values of theirs fitted on a few images of all classes.

Each clone's log-odds were fitted against the base alone. It has never seen the classes of the others, and tends to be
too sure of itself; so it may fire on their images. Calibration moves the log-odds l of a clone to

    scale * l + offset[class] + log p(own | own or rival),

the scale above 0 and the same for all its classes. The last term is what the clone's own features say against the
classes of the other clones, its rivals: their images are far from all that its log-odds were fitted on, and there it
may be as sure as on its own. Linear discriminants that are fitted on the support tell them apart, as far as the
source's features do; how sure they may be is decided on images that they were not fitted on.

Scales and offsets are found together, as the most probable ones given the support and a prior that says: as before. The
problem is convex and small. The target's logits take no part in it, so the distribution among the base classes stays
the target's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.clones.branch import Scalars, against_rivals
from pnc.composite.composite import Composite
from pnc.data.image_set import images_as_float
from pnc.data.support import Support, as_images, as_support
from pnc.foundation.argument_checks import check_whole
from pnc.foundation.class_names import listed
from pnc.foundation.errors import ClassNameError, InputError
from pnc.foundation.network_state import undisturbed
from pnc.method.discriminants import choose_shrinkage, fit_discriminants
from pnc.method.head_fitting import balanced_weights

SCALE_SPREAD = 0.1
OFFSET_SPREAD = 0.3
CLASS_SPREAD = 0.5
"""Standard deviations of the prior: of a scale about 1, of a clone's offset about 0 in nats, and of the offset of each
of its classes about that one. They are small because the support is usually the one that the clones were made from: on
it each clone looks better than it is, and the weights of its head, fitted on held-out images, deserve more trust. Where
some hundred images say otherwise, they are stronger all the same."""

N_FOLDS = 5
"""Into so many parts, at most, the support is parted to judge discriminants on images that they were not fitted on."""

SURENESS = tuple(step / 20 for step in range(21))
"""What discriminants of own classes against rivals may be multiplied by: 0 leaves them out, 1 believes them."""

MAX_STEPS = 100
"""Newton steps at most; ten are usual."""

MIN_SCALE = 0.05
"""A clone whose log-odds say nothing, or the opposite, on the support is turned down this far and no further."""


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        scalars: By name of the clone, as `Composite.rescale` takes them.
        loss_before: Mean cross-entropy of the uncalibrated logits on the support, in nats, base and new samples
            weighing the same, and so the classes of either kind;
            over the new classes alone where there are no base samples.
        loss_after: The same after calibration, rivals being judged on images that they were not fitted on.
        n_images: In the support and the background.
        has_base: Whether any of them shows a base class; without, scales stay 1.
    """

    scalars: Mapping[str, Scalars]
    loss_before: float
    loss_after: float
    n_images: int
    has_base: bool


@dataclass(frozen=True, eq=False)
class _Problem:
    """What is fitted on, in float64; the new classes of all clones stand side by side.

    Attributes:
        base_logits: (N, K_base); no column where there are no base samples.
        level: What the log-odds are added to, (N, K_new): logsumexp of the target's logits, or zero where that does not
            matter; and what each clone's features say against its rivals.
        log_odds: Of all new classes, (N, K_new).
        labels: (N,), places among the columns of `base_logits` followed by those of `log_odds`.
        owner: Which clone each new class belongs to, (K_new, n_clones), one-hot.
    """

    base_logits: Tensor
    level: Tensor
    log_odds: Tensor
    labels: Tensor
    owner: Tensor

    @property
    def weights(self) -> Tensor:
        """Of the samples, (N,), as in the heads of clones; the sum is 1."""
        weights = balanced_weights(self.labels, self.base_logits.shape[1])
        return weights / weights.sum()

    def logits(self, scales: Tensor, offsets: Tensor) -> Tensor:
        """Of all classes, (N, K_base + K_new), given scales (n_clones,) and offsets (K_new,)."""
        return torch.cat([self.base_logits, self.level + self.log_odds * (self.owner @ scales) + offsets], 1)

    def loss(self, scales: Tensor, offsets: Tensor) -> Tensor:
        """Weighted mean of the cross-entropy."""
        losses = F.cross_entropy(self.logits(scales, offsets), self.labels, reduction="none")
        return (self.weights * losses).sum()

    @property
    def prior_precision(self) -> Tensor:
        """Of scales and offsets in one vector: the inverse of their covariance, over the number of samples."""
        n_new, n_clones = self.owner.shape
        covariance = torch.zeros(n_clones + n_new, n_clones + n_new, dtype=torch.float64)
        covariance[:n_clones, :n_clones] = SCALE_SPREAD**2 * torch.eye(n_clones)
        own = CLASS_SPREAD**2 * torch.eye(n_new, dtype=torch.float64)
        covariance[n_clones:, n_clones:] = OFFSET_SPREAD**2 * self.owner @ self.owner.T + own
        precision: Tensor = torch.linalg.inv(covariance)
        return precision / len(self.labels)

    def slopes(self, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian of the loss in scales and offsets in one vector."""
        n_base = self.base_logits.shape[1]
        p = self.logits(scales, offsets).softmax(1)[:, n_base:]
        wrong = self.weights[:, None] * (p - (self.labels[:, None] - n_base == torch.arange(p.shape[1])).double())
        p_l, weighted = p * self.log_odds, self.weights[:, None] * p
        weighted_l = weighted * self.log_odds
        gradient = torch.cat([self.owner.T @ (wrong * self.log_odds).sum(0), wrong.sum(0)])
        in_scales = self.owner.T @ ((weighted_l * self.log_odds).sum(0).diag() - weighted_l.T @ p_l) @ self.owner
        mixed = (weighted_l.sum(0).diag() - weighted.T @ p_l) @ self.owner
        in_offsets = weighted.sum(0).diag() - weighted.T @ p
        return gradient, torch.cat([torch.cat([in_scales, mixed.T], 1), torch.cat([mixed, in_offsets], 1)])


@undisturbed()
def calibrate(net: Composite, support: Any, *, background: Any = None, batch_size: int = 128) -> Calibration:
    """Fit the scalars of all enabled clones together, and set them in the composite; takes seconds.

    It starts from the uncalibrated clones each time, so it may be repeated, and must be when a clone has come or gone.
    Only the composite's own copies of the clones change: the clones that were given to `attach`, the target, and the
    target's logits stay as they are. `net.clone(name)` gives a calibrated clone, to be saved.

    Args:
        net: With at least one clone enabled.
        support: As `clone` takes it: a few labelled images of every new class, labels as names or as places in
            `net.classes`. Samples of base classes are optional. Without any, and without background, nothing is known
            about base against new: the clones are weighed against each other only, by offsets that change nothing on
            the whole.
        background: As `clone` takes it: unlabelled images that the target is used on; they become samples of the base
            classes that the target itself sees in them.
        batch_size: Images that go through the network at a time.
    Raises:
        InputError: `net` is no composite, no clone is enabled, a new class has no sample, or the background images are
            none, or of another shape.
        ClassNameError: the support has samples of a class that the composite does not know.
    """
    if not isinstance(net, Composite):
        raise InputError(f"net: expected a composite, what pnc.attach gives; got {type(net).__name__}")
    check_whole(batch_size, "batch_size", 1)
    names, base = net.classes, net.base_classes
    if len(names) == len(base):
        raise InputError("net: no clone is enabled; attach one, or leave the block of disabled()")
    data = as_support(support, names=names)
    labels = _labels(data, names, len(base))
    unlabelled = data.images[:0] if background is None else as_images(background, "background", data.images)
    base_logits, found, features = collect_log_odds(net, torch.cat([data.images, unlabelled]), batch_size)
    labels = torch.cat([labels, base_logits[len(labels) :].argmax(1)])
    has_base = bool((labels < len(base)).any())
    level, log_odds = base_logits.logsumexp(1, keepdim=True), torch.cat(list(found.values()), 1)
    owner = torch.arange(len(found)).repeat_interleave(torch.tensor([one.shape[1] for one in found.values()]))
    told = [_against_rivals(one, labels - len(base), owner == place) for place, one in enumerate(features.values())]
    if not has_base:
        base_logits, level, labels = base_logits[:, :0], 0 * level, labels - len(base)
    raw = _Problem(base_logits, level, log_odds, labels, F.one_hot(owner, len(found)).double())
    problem = replace(raw, level=level + torch.cat([one for one, _ in told], 1)[:, owner])
    scales, offsets = _most_probable(problem, fit_scales=has_base)
    if not has_base:
        offsets = offsets - offsets.mean()  # what is common to all new classes speaks of base against new
    sizes = problem.owner.sum(0).long().tolist()
    scalars = {
        name: Scalars(float(scale), tuple(one.tolist()), rivals)
        for name, scale, one, (_, rivals) in zip(found, scales, offsets.split(sizes), told, strict=True)
    }
    net.rescale(scalars)
    return Calibration(
        scalars=scalars,
        loss_before=float(raw.loss(torch.ones_like(scales), torch.zeros_like(offsets))),
        loss_after=float(problem.loss(scales, offsets)),
        n_images=len(labels),
        has_base=has_base,
    )


def _against_rivals(features: Tensor, labels: Tensor, is_own: Tensor) -> tuple[Tensor, tuple[tuple[float, ...], ...]]:
    """Tell a clone's classes from those of the others, on its own features.

    Args:
        features: (N, D_s).
        labels: (N,), places among the new classes of all clones; below 0 for images of base classes.
        is_own: Which of the new classes are the clone's, (K_new,) bool.
    Returns:
        log p(own | own or rival), (N, 1), of new images by discriminants that were fitted without them; and the rivals
        as in `Scalars`. Zeros and none where there are no others, or some class has one image only.
    """
    is_new = labels >= 0
    own, others = is_own.nonzero().flatten(), (~is_own).nonzero().flatten()
    n_folds = min(N_FOLDS, int(labels[is_new].bincount().min()))
    nothing = torch.zeros(len(labels), 1, dtype=torch.float64), ()
    if not len(others) or n_folds < 2:
        return nothing
    place = torch.cat([others, own]).argsort()[labels[is_new]]
    rows, folds = features[is_new], _number_within_class(place) % n_folds
    shrinkage, odds = choose_shrinkage(rows, place, folds, len(others))
    log_odds = odds.logsumexp(1, keepdim=True)
    sureness = _sureness(log_odds, place >= len(others))
    if sureness == 0:
        return nothing
    weight, bias = fit_discriminants(rows, place, len(is_own), shrinkage)
    rivals = sureness * torch.cat([weight, bias[:, None]], 1)
    against = against_rivals(features, rivals.double(), len(own))
    against[is_new] = sureness * log_odds
    return F.logsigmoid(against), tuple(map(tuple, rivals.tolist()))


def _sureness(log_odds: Tensor, is_own: Tensor) -> float:
    """The factor that makes log-odds (N, 1) of own against rival most probable, both kinds weighing the same."""
    signed = torch.where(is_own[:, None], log_odds, -log_odds)

    def loss(factor: float) -> float:
        losses = -F.logsigmoid(factor * signed)
        return float(losses[is_own].mean() + losses[~is_own].mean())

    return min(SURENESS, key=loss)


def _number_within_class(labels: Tensor) -> Tensor:
    """How many earlier samples have the label of each, (N,)."""
    numbers = torch.empty_like(labels)
    for label in labels.unique():
        rows = labels == label
        numbers[rows] = torch.arange(int(rows.sum()))
    return numbers


def _labels(data: Support, names: Sequence[str], n_base: int) -> Tensor:
    """Labels as places in `names`; every doubt about the support is settled."""
    counts = data.labels.bincount(minlength=len(data.names)).tolist()
    seen = {name for name, count in zip(data.names, counts, strict=True) if count}
    foreign = sorted(seen - set(names))
    if foreign:
        raise ClassNameError(
            f"support has samples of {listed(foreign)}, which the composite does not know; it knows {listed(names)}"
        )
    missing = [name for name in names[n_base:] if name not in seen]
    if missing:
        raise InputError(f"support has no sample of {listed(missing)}; every class of the clones needs at least one")
    place = torch.tensor([names.index(name) if name in seen else -1 for name in data.names])
    return place[data.labels]


def collect_log_odds(
    net: Composite, images: Tensor, batch_size: int = 128
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Run images through `Composite.log_odds`.

    Args:
        net: On any device.
        images: (N, C, H, W), uint8 or floating point.
        batch_size: Images at a time.
    Returns:
        The target's logits (N, K_base) and, by name, each enabled clone's uncalibrated log-odds (N, K_new) and its
        features (N, D_s); float64 on the CPU.
    """
    like = next(net.parameters(), torch.empty(0))
    base_logits: list[Tensor] = []
    log_odds: dict[str, list[Tensor]] = {}
    features: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in images.split(batch_size):
            base, found = net.log_odds(images_as_float(batch).to(like.device, like.dtype))
            base_logits.append(base.double().cpu())
            for name, (one, own) in found.items():
                log_odds.setdefault(name, []).append(one.double().cpu())
                features.setdefault(name, []).append(own.double().cpu())
    joined, own_features = ({name: torch.cat(parts) for name, parts in kind.items()} for kind in (log_odds, features))
    return torch.cat(base_logits), joined, own_features


def _most_probable(problem: _Problem, fit_scales: bool) -> tuple[Tensor, Tensor]:
    """Scales (n_clones,) and offsets (K_new,) of the largest posterior probability, scales no less than `MIN_SCALE`."""
    n_new, n_clones = problem.owner.shape
    values = torch.cat([torch.ones(n_clones), torch.zeros(n_new)]).double()
    free = torch.ones(len(values), dtype=torch.bool)
    free[:n_clones] = fit_scales
    values = _newton(problem, values, free)
    while bool((values[:n_clones] < MIN_SCALE).any()):
        free[:n_clones] &= values[:n_clones] >= MIN_SCALE
        values[:n_clones] = values[:n_clones].clamp_min(MIN_SCALE)
        values = _newton(problem, values, free)
    return values[:n_clones], values[n_clones:]


def _newton(problem: _Problem, values: Tensor, free: Tensor) -> Tensor:
    """Minimise loss and prior over the `free` ones of the values, from the given ones on: damped Newton steps."""
    n_clones = problem.owner.shape[1]
    mean = torch.zeros_like(values)
    mean[:n_clones] = 1
    precision = problem.prior_precision

    def objective(at: Tensor) -> float:
        return float(problem.loss(at[:n_clones], at[n_clones:]) + (at - mean) @ precision @ (at - mean) / 2)

    now = objective(values)
    for _ in range(MAX_STEPS):
        gradient, hessian = problem.slopes(values[:n_clones], values[n_clones:])
        gradient = (gradient + precision @ (values - mean))[free]
        step = torch.zeros_like(values)
        step[free] = torch.linalg.solve((hessian + precision)[free][:, free], gradient)
        size, gain = 1.0, float(gradient @ step[free])
        while (reached := objective(values - size * step)) > now - 0.1 * size * gain and size > 1e-8:
            size /= 2
        if reached >= now:
            break
        values, now = values - size * step, reached
        if gain < 1e-14:
            break
    return values
