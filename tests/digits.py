"""A target that knows digits 0-4 and a source that knows 5-9, trained once for all tests of a session."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pnc.data.image_set import ImageSet, class_subset, relabel
from pnc.data.readers import load_data
from pnc.data.support import Support, draw_support
from pnc.models.model_specs import LoadedModel
from pnc.models.pretraining import Recipe, pretrain

BASE, NEW = tuple("01234"), tuple("56789")
RECIPE = Recipe(epochs=12, batch_size=64, crop_padding=1, flip=False)


@cache
def network(classes: tuple[str, ...], spec: str = "zoo:cnn") -> LoadedModel:
    """A trained reference network; shared by all tests, so none may change it."""
    train, test = load_data("digits", "train"), load_data("digits", "test")
    with TemporaryDirectory() as folder:
        out = Path(folder) / "network.safetensors"
        return pretrain(spec, class_subset(train, classes), class_subset(test, classes), RECIPE, out)


@dataclass(frozen=True)
class Pair:
    target: LoadedModel
    source: LoadedModel

    def names(self) -> dict[str, Any]:
        return {"source_classes": self.source.classes, "base_classes": self.target.classes}


def pair() -> Pair:
    return Pair(network(BASE), network(NEW))


def support(n_new: int = 20, n_base: int = 5, classes: tuple[str, ...] = NEW, seed: int = 0) -> Support:
    generator = torch.Generator().manual_seed(seed)
    return draw_support(load_data("digits"), classes, BASE, n_new, n_base, generator)


def held_out_images(classes: tuple[str, ...] = NEW) -> ImageSet:
    data = load_data("digits", "test")
    return relabel(class_subset(data, (*BASE, *classes)), (*BASE, *classes))


def write_images(folder: Path, split: str, classes: tuple[str, ...], n_images: int) -> Path:
    """Some digits as image files, FOLDER/SPLIT/CLASS/NUMBER.png; the folder can be read as `folder:FOLDER`."""
    from PIL import Image

    for name in classes:
        images = class_subset(load_data("digits", split), (name,)).images[:n_images]
        place = folder / split / name
        place.mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy()).save(place / f"{number}.png")
    return folder
