"""Calibration of clones that were made separately: a few values of each, fitted on a few images of all classes.

Each clone's log-odds were fitted against the base classes only. It has never seen the classes of the others and is
usually overconfident, so it may respond to their images. Calibration changes the log-odds l of a clone to

    scale * l + offset[class] + log p(own | own or rival),

with a scale above 0 for all its classes. The last term compares its classes with those of the other clones, its rivals,
by the clone's own features: images of rivals are far from everything that its log-odds were fitted on, where it may be
as confident as on its own. Linear discriminants fitted on the support separate them, as far as the source's features
do; held-out images determine how much to trust them.

Scales and offsets are fitted together, as the most probable values given the support and a prior around no change. The
problem is convex and small. The target's logits do not change, so the distribution among the base classes stays the
target's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.clones.branch import Scalars, against_rivals
from pnc.composite.composite import Composite, check_composite
from pnc.composite.forward_plan import Plan
from pnc.data.image_range import check_values
from pnc.data.image_set import images_as_float
from pnc.data.support import Support, as_images, as_support
from pnc.foundation.argument_checks import check_whole
from pnc.foundation.class_names import listed
from pnc.foundation.errors import ClassNameError, InputError
from pnc.foundation.network_state import undisturbed
from pnc.foundation.plain_text import few_names
from pnc.method.discriminants import choose_shrinkage, fit_discriminants
from pnc.method.head_fitting import balanced_weights

SCALE_SPREAD = 0.1
OFFSET_SPREAD = 0.3
CLASS_SPREAD = 0.5
"""Standard deviations of the prior: of a scale about 1, of a clone's offset about 0 in nats, and of the offsets of its
classes about that one. They are small because the support is usually the one that the clones were made from: on it each
clone looks better than it is, and its head, whose weights were fitted on held-out images, deserves more trust. A few
hundred images still outweigh the prior."""

N_FOLDS = 5
"""Largest number of folds of the support for evaluating discriminants on held-out images."""

SURENESS = tuple(step / 20 for step in range(21))
"""Candidate factors for the discriminants of own classes against rivals: 0 ignores them, 1 trusts them fully."""

MAX_STEPS = 100
"""Largest number of Newton steps; ten are usual."""

MIN_SCALE = 0.05
"""Smallest scale, for a clone whose log-odds are uninformative or wrong on the support."""


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`.

    Attributes:
        scalars: By name of the clone, as for `Composite.rescale`.
        loss_before: Mean cross-entropy of the uncalibrated logits on the support, in nats; base and new samples have
            equal weight, and so have the classes of each kind. Without base samples, over the new classes only.
        loss_after: The same after calibration, with discriminants against rivals evaluated on held-out images.
        n_images: Images in the support and the background.
        has_base: Whether any of them shows a base class; if not, scales stay 1.
    """

    scalars: Mapping[str, Scalars]
    loss_before: float
    loss_after: float
    n_images: int
    has_base: bool

    def __str__(self) -> str:
        known = "base and new classes" if self.has_base else "among the new classes only, as there was no base image"
        clones = [f"{name} (scale {one.scale:.2f})" for name, one in self.scalars.items()]
        return (
            f"Calibration of {few_names(clones)} on {self.n_images} images: log-loss {self.loss_before:.3f}, then "
            f"{self.loss_after:.3f}, {known}"
        )


@dataclass(frozen=True, eq=False)
class _Problem:
    """Data of the fit, in float64; the new classes of all clones are concatenated.

    Attributes:
        base_logits: (N, K_base); no columns without base samples.
        level: Added to the log-odds, (N, K_new): logsumexp of the target's logits, or zero without base samples; plus
            the term of each clone against its rivals.
        log_odds: Of all new classes, (N, K_new).
        labels: (N,), indices of columns of `base_logits` followed by those of `log_odds`.
        owner: Clone of each new class, (K_new, n_clones), one-hot.
    """

    base_logits: Tensor
    level: Tensor
    log_odds: Tensor
    labels: Tensor
    owner: Tensor

    @property
    def weights(self) -> Tensor:
        """Weights of the samples, (N,), as in the heads of clones; their sum is 1."""
        weights = balanced_weights(self.labels, self.base_logits.shape[1])
        return weights / weights.sum()

    def logits(self, scales: Tensor, offsets: Tensor) -> Tensor:
        """Logits of all classes, (N, K_base + K_new), given scales (n_clones,) and offsets (K_new,)."""
        return torch.cat([self.base_logits, self.level + self.log_odds * (self.owner @ scales) + offsets], 1)

    def loss(self, scales: Tensor, offsets: Tensor) -> Tensor:
        """Weighted mean cross-entropy."""
        losses = F.cross_entropy(self.logits(scales, offsets), self.labels, reduction="none")
        return (self.weights * losses).sum()

    @property
    def prior_precision(self) -> Tensor:
        """Inverse prior covariance of scales and offsets in one vector, divided by the number of samples."""
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

    It always starts from the uncalibrated clones, so it can be repeated, and must be repeated after clones were
    attached or detached. Only the composite's own copies of the clones change: the clones given to `attach`, the
    target, and the target's logits do not. `net.clone(name)` returns a calibrated clone, for saving.

    Args:
        net: With at least one clone enabled.
        support: As for `clone`: a few labelled images of every new class; labels are names or indices in
            `net.classes`. Samples of base classes are optional. Without any, and without background, only the clones
            are weighed against each other, by offsets with a mean of zero.
        background: As for `clone`: unlabelled images that the target is used on; they become samples of the base
            classes that the target predicts for them.
        batch_size: Images per batch.
    Raises:
        InputError: `net` is not a composite, no clone is enabled, a new class has no sample, the background is empty
            or of another shape, or another thread detached or replaced a clone meanwhile.
        ClassNameError: the support has samples of a class that the composite does not know.

    >>> net = pnc.attach(target, clone)
    >>> found = pnc.calibrate(net, support)
    >>> found.loss_after < found.loss_before
    True
    """
    check_composite(net)
    check_whole(batch_size, "batch_size", 1)
    plan = net.now()  # one set of clones for the whole fit: other threads may change the composite
    names, base = plan.classes, net.base_classes
    if len(names) == len(base):
        raise InputError("net: no clone is enabled; attach one, or leave the block of disabled()")
    data = as_support(support, names=names)
    labels = _labels(data, names, len(base))
    unlabelled = data.images[:0] if background is None else as_images(background, "background", data.images)
    images = torch.cat([data.images, unlabelled])
    check_values(images, net.target, "the target")
    base_logits, found, features = collect_log_odds(plan, images, batch_size)
    labels = torch.cat([labels, base_logits[len(labels) :].argmax(1)])
    has_base = bool((labels < len(base)).any())
    level, log_odds = base_logits.logsumexp(1, keepdim=True), torch.cat(list(found.values()), 1)
    owner = torch.arange(len(found)).repeat_interleave(torch.tensor([one.shape[1] for one in found.values()]))
    against = [_against_rivals(one, labels - len(base), owner == place) for place, one in enumerate(features.values())]
    if not has_base:
        base_logits, level, labels = base_logits[:, :0], 0 * level, labels - len(base)
    raw = _Problem(base_logits, level, log_odds, labels, F.one_hot(owner, len(found)).double())
    problem = replace(raw, level=level + torch.cat([one for one, _ in against], 1)[:, owner])
    scales, offsets = _most_probable(problem, fit_scales=has_base)
    if not has_base:
        offsets = offsets - offsets.mean()  # a common offset would only matter for base against new
    sizes = problem.owner.sum(0).long().tolist()
    scalars = {
        name: Scalars(float(scale), tuple(one.tolist()), rivals)
        for name, scale, one, (_, rivals) in zip(found, scales, offsets.split(sizes), against, strict=True)
    }
    net.rescale(scalars, found_on=plan)
    return Calibration(
        scalars=scalars,
        loss_before=float(raw.loss(torch.ones_like(scales), torch.zeros_like(offsets))),
        loss_after=float(problem.loss(scales, offsets)),
        n_images=len(labels),
        has_base=has_base,
    )


def _against_rivals(features: Tensor, labels: Tensor, is_own: Tensor) -> tuple[Tensor, tuple[tuple[float, ...], ...]]:
    """Separate a clone's classes from those of the others, by its own features.

    Args:
        features: (N, D_s).
        labels: (N,), indices among the new classes of all clones; below 0 for images of base classes.
        is_own: Whether each new class is the clone's, (K_new,) bool.
    Returns:
        log p(own | own or rival), (N, 1), for new images by discriminants that were fitted without them; and the rivals
        as in `Scalars`. Zeros and no rivals if there are no other clones, or a class has only one image.
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
    """The factor of the log-odds (N, 1) of own against rival with the lowest loss; both kinds have equal weight."""
    signed = torch.where(is_own[:, None], log_odds, -log_odds)

    def loss(factor: float) -> float:
        losses = -F.logsigmoid(factor * signed)
        return float(losses[is_own].mean() + losses[~is_own].mean())

    return min(SURENESS, key=loss)


def _number_within_class(labels: Tensor) -> Tensor:
    """Number of earlier samples with the same label, (N,)."""
    numbers = torch.empty_like(labels)
    for label in labels.unique():
        rows = labels == label
        numbers[rows] = torch.arange(int(rows.sum()))
    return numbers


def _labels(data: Support, names: Sequence[str], n_base: int) -> Tensor:
    """Labels as indices in `names`, after checking the classes of the support."""
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
    plan: Plan, images: Tensor, batch_size: int = 128
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Run images through `Plan.log_odds`.

    Args:
        plan: From `Composite.now`, on any device.
        images: (N, C, H, W), uint8 or floating point.
        batch_size: Images at a time.
    Returns:
        The target's logits (N, K_base) and, by name, each enabled clone's uncalibrated log-odds (N, K_new) and features
        (N, D_s); float64 on the CPU.
    """
    base_logits: list[Tensor] = []
    log_odds: dict[str, list[Tensor]] = {}
    features: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in images.split(batch_size):
            base, found = plan.log_odds(images_as_float(batch).to(plan.probe))
            base_logits.append(base.double().cpu())
            for name, (one, own) in found.items():
                log_odds.setdefault(name, []).append(one.double().cpu())
                features.setdefault(name, []).append(own.double().cpu())
    joined, own_features = ({name: torch.cat(parts) for name, parts in kind.items()} for kind in (log_odds, features))
    return torch.cat(base_logits), joined, own_features


def _most_probable(problem: _Problem, fit_scales: bool) -> tuple[Tensor, Tensor]:
    """Scales (n_clones,), at least `MIN_SCALE`, and offsets (K_new,) with the largest posterior probability."""
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
    """Minimise loss and prior over the `free` values, starting from the given ones, by damped Newton steps."""
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
