"""Real networks for `pnc bench zoo`: which sources and targets there are, and how they are trained.

All are trained on the first part of each class only: the supports of the bench are drawn from the rest, so that no
network has seen the images by which it is ranked.
"""

from dataclasses import dataclass
from pathlib import Path

from pnc.data.image_set import ImageSet, class_subset, sample_per_class
from pnc.data.readers import load_data
from pnc.models.model_specs import LoadedModel
from pnc.models.pretraining import Recipe, pretrain, recipe_for

TRAINED_SHARE = 0.8
"""Share of each class's training images that networks may be trained on; supports come from the others."""
N_TRAINED = 1000
"""At most this many images of a class are trained on."""
N_TEST = 200
"""At most this many test images of each class are used."""

WILD = ("bear", "leopard", "lion", "tiger", "wolf", "fox", "raccoon", "skunk")
VEHICLES = ("bus", "pickup_truck", "train", "motorcycle", "bicycle", "streetcar", "tank", "tractor")
PLANTS = ("orchid", "poppy", "rose", "sunflower", "tulip", "maple_tree", "oak_tree", "palm_tree")
THINGS = ("bottle", "bowl", "chair", "clock", "lamp", "telephone", "keyboard", "couch")
SEA = ("dolphin", "shark", "whale", "ray", "trout", "flatfish", "crab", "lobster")
MIXED = (*WILD[:4], *VEHICLES[:4], *PLANTS[:4], *THINGS[:4], *SEA[:4])
OUTDOORS = ("mountain", "cloud", "forest", "road", "sea", "plain", "castle", "bridge")
SMALL = ("hamster", "mouse", "rabbit", "squirrel", "beaver", "otter")

CIFAR100, CIFAR10, FASHION, MNIST = DATA = ("cifar100", "cifar10_jpeg", "fashion_mnist", "mnist")
"""Folders of the images, each with train.parquet and test.parquet."""
PHOTOGRAPHS = CIFAR100, CIFAR10


@dataclass(frozen=True)
class NetworkPlan:
    """One network to train.

    Attributes:
        name: Of its entry and file.
        data: One of `DATA`.
        classes: Their names, or a slice of the data's own.
        spec: A reference network.
        epochs: Passes over the images.
    """

    name: str
    data: str
    classes: tuple[str, ...] | slice
    spec: str
    epochs: int

    def names(self, data: ImageSet) -> tuple[str, ...]:
        """The names of its classes."""
        return data.classes[self.classes] if isinstance(self.classes, slice) else self.classes


def _of_group(group: str, classes: tuple[str, ...]) -> list[NetworkPlan]:
    return [
        NetworkPlan(f"{group}-cnn", "cifar100", classes, "zoo:cnn", 8),
        NetworkPlan(f"{group}-resnet", "cifar100", classes, "zoo:resnet20", 8),
        NetworkPlan(f"{group}-weak", "cifar100", classes, "zoo:cnn?width=0.5", 2),
    ]


_FIRST, _SECOND, _ALL = slice(0, 5), slice(5, 10), slice(0, 10)
TARGETS = (
    NetworkPlan("target-outdoors", "cifar100", OUTDOORS, "zoo:cnn?width=0.5", 10),
    NetworkPlan("target-small", "cifar100", SMALL, "zoo:resnet20?width=0.5", 10),
    NetworkPlan("target-cifar10", "cifar10_jpeg", _FIRST, "zoo:resnet20?width=0.5", 5),
    NetworkPlan("target-fashion", "fashion_mnist", _FIRST, "zoo:cnn?width=0.5", 3),
    NetworkPlan("target-mnist", "mnist", _FIRST, "zoo:cnn?width=0.25", 2),
)
SOURCES = (
    *_of_group("wild", WILD),
    *_of_group("vehicles", VEHICLES),
    *_of_group("plants", PLANTS),
    *_of_group("things", THINGS),
    *_of_group("sea", SEA),
    NetworkPlan("wild-vit", "cifar100", WILD, "zoo:vit_tiny?dim=64&depth=4", 8),
    NetworkPlan("vehicles-mobilenet", "cifar100", VEHICLES, "zoo:mobilenetv2?width=0.25", 4),
    NetworkPlan("mixed-cnn", "cifar100", MIXED, "zoo:cnn", 5),
    NetworkPlan("mixed-resnet", "cifar100", MIXED, "zoo:resnet20", 3),
    NetworkPlan("cifar10-cnn", "cifar10_jpeg", _SECOND, "zoo:cnn", 5),
    NetworkPlan("cifar10-resnet", "cifar10_jpeg", _SECOND, "zoo:resnet20", 4),
    NetworkPlan("cifar10-weak", "cifar10_jpeg", _SECOND, "zoo:cnn?width=0.5", 1),
    NetworkPlan("cifar10-all-cnn", "cifar10_jpeg", _ALL, "zoo:cnn", 3),
    NetworkPlan("cifar10-all-resnet", "cifar10_jpeg", _ALL, "zoo:resnet20", 2),
    NetworkPlan("cifar10-first-cnn", "cifar10_jpeg", _FIRST, "zoo:cnn", 4),
    NetworkPlan("fashion-cnn", "fashion_mnist", _SECOND, "zoo:cnn", 3),
    NetworkPlan("fashion-weak", "fashion_mnist", _SECOND, "zoo:cnn?width=0.25", 1),
    NetworkPlan("fashion-all-cnn", "fashion_mnist", _ALL, "zoo:cnn?width=0.5", 2),
    NetworkPlan("fashion-first-cnn", "fashion_mnist", _FIRST, "zoo:cnn?width=0.5", 2),
    NetworkPlan("mnist-cnn", "mnist", _SECOND, "zoo:cnn?width=0.5", 2),
    NetworkPlan("mnist-weak", "mnist", _SECOND, "zoo:cnn?width=0.25", 1),
    NetworkPlan("mnist-all-cnn", "mnist", _ALL, "zoo:cnn?width=0.5", 1),
)


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one data set: to train networks on, to draw supports from, and to test on."""

    trained: ImageSet
    unseen: ImageSet
    test: ImageSet


def load_images(folder: Path, data: str) -> Images:
    """Read one of `DATA` and split its training images by their order in each class."""
    train, test = (load_data(f"parquet:{folder / data}", split) for split in ("train", "test"))
    least = min(train.counts().values())
    n_trained, n_unseen = min(N_TRAINED, int(TRAINED_SHARE * least)), least - int(TRAINED_SHARE * least)
    n_test = min(N_TEST, *test.counts().values())
    return Images(
        sample_per_class(train, n_trained, "first"),
        sample_per_class(train, n_unseen, "last"),
        sample_per_class(test, n_test, "first"),
    )


def recipe_of(plan: NetworkPlan) -> Recipe:
    """Return how a network is trained: as the reference recipe says, for fewer epochs and in bfloat16."""
    usual = recipe_for(plan.spec)
    return Recipe(
        epochs=plan.epochs,
        optimizer=usual.optimizer,
        lr=usual.lr,
        weight_decay=usual.weight_decay,
        flip=plan.data in PHOTOGRAPHS,
        precision="bfloat16",
        threads=1,
    )


def train_network(plan: NetworkPlan, images: Images, path: Path) -> LoadedModel:
    """Train a network; a stopped run continues from `path` with ".partial.safetensors" appended."""
    names = plan.names(images.trained)
    return pretrain(
        plan.spec, class_subset(images.trained, names), class_subset(images.test, names), recipe_of(plan), path
    )
