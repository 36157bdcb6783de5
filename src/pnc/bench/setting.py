"""What the cells of a bench share: a pair of networks, images, and the size of a support."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pnc.composite.batched_logits import logits_of
from pnc.data.image_set import ImageSet, class_subset, draw_images, images_as_float, relabel
from pnc.data.support import Support, draw_support
from pnc.foundation.errors import InputError
from pnc.models.model_specs import LoadedModel


@dataclass(frozen=True)
class Setting:
    """A pair of networks, images, and how supports are drawn.

    Attributes:
        source: Knows the new classes.
        target: Receives them.
        train: Images that supports are drawn from.
        test: Images to measure on.
        data: Name of the images in the results.
        n_new: Support images per new class; None for all.
        n_base: Per base class.
        flip: Mirror images may be used, by all methods.
        n_unlabelled: More images per base class, without their labels, that clones are made with.
        n_test: Test images per class, if not all are used; a label of `test`, which is reduced already.
        batch_size: Images that go through a network at a time while a clone is made; at most, when it is measured.
        given: How the command line named the networks, for the results.
    """

    source: LoadedModel
    target: LoadedModel
    train: ImageSet
    test: ImageSet
    data: str
    n_new: int | None
    n_base: int | None
    flip: bool
    n_unlabelled: int = 0
    n_test: int | None = None
    batch_size: int = 128
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where both networks are."""
        return next(self.target.module.parameters()).device

    @property
    def new_classes(self) -> tuple[str, ...]:
        """All that the source knows and the target lacks."""
        return tuple(name for name in self.source.classes if name not in self.target.classes)

    @property
    def support(self) -> str:
        """Images per new / per base class, and unlabelled ones per base class."""
        sizes = "/".join("all" if number is None else str(number) for number in (self.n_new, self.n_base))
        return f"{sizes} and {self.n_unlabelled} unlabelled" if self.n_unlabelled else sizes

    @property
    def facts(self) -> dict[str, Any]:
        """What rows depend on, for the head of a result file."""
        return {**self.given, "data": self.data, "support": self.support, "flip": self.flip}

    @property
    def words(self) -> str:
        """The same for people."""
        flips = ", with mirror images" if self.flip else ""
        return f"{self.data}; support of {self.support} images per new/base class{flips}"

    def draw(self, classes: Sequence[str], seed: int) -> Support:
        """Draw a support of `classes` and of the base classes."""
        generator = torch.Generator().manual_seed(seed)
        return draw_support(self.train, classes, self.target.classes, self.n_new, self.n_base, generator)

    def arguments(self, classes: Sequence[str], seed: int) -> dict[str, Any]:
        """Arguments of `clone` and `prepare_task`, except networks and support."""
        names = {"classes": classes, "source_classes": self.source.classes, "base_classes": self.target.classes}
        background = self._unlabelled(classes, seed) if self.n_unlabelled else None
        return {**names, "background": background, "flip": self.flip, "seed": seed, "batch_size": self.batch_size}

    def _unlabelled(self, classes: Sequence[str], seed: int) -> Tensor:
        """Draw images of the base classes that are not in the support of this seed."""
        if self.n_base is None:
            raise InputError("unlabelled: the support has all images of the base classes; give it fewer")
        base, generator = self.target.classes, torch.Generator().manual_seed(seed)
        counts = self.train.counts()
        most = min(counts[name] for name in base) - self.n_base
        if self.n_unlabelled > most:
            raise InputError(f"unlabelled: {self.n_unlabelled} per class, but beside the support some have {most} left")
        n_base = self.n_base + self.n_unlabelled  # a smaller draw is the beginning of a larger one
        drawn = draw_images(self.train, classes, base, self.n_new, n_base, generator)
        places = torch.arange(len(base) * n_base)
        return images_as_float(drawn.images[places[places % n_base >= self.n_base]])

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Run a network on images (N, C, H, W); return its logits (N, K) on the CPU."""
        return logits_of(model, images, min(64, self.batch_size))

    def test_images(self, classes: Sequence[str]) -> ImageSet:
        """Test images of the base classes and of `classes`, labelled in this order."""
        names = [*self.target.classes, *classes]
        return relabel(class_subset(self.test, names), names)
