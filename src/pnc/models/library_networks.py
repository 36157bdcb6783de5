"""Classifiers of timm, torchvision and transformers, each with the preprocessing and class names of its config."""

import importlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pnc.foundation.class_names import unknown_name
from pnc.foundation.errors import InputError, PNCError
from pnc.models.preprocessing import Interpolation, Preprocessed

_PILLOW_FILTERS: dict[int, Interpolation] = {0: "nearest", 1: "bicubic", 2: "bilinear", 3: "bicubic"}  # 1 is Lanczos
_WITHOUT_DOWNLOAD = "weights=FILE or ?pretrained=false need no download"
_PLACEHOLDER = re.compile(r"LABEL_\d+")  # transformers' names of unnamed classes


@dataclass(frozen=True)
class LibraryRequest:
    """A request for a network of a library.

    Attributes:
        spec: The whole model spec, for messages.
        name: Its name in the library.
        options: Of the spec: "size" and others, by library.
        pretrained: Whether it comes with the library's weights instead of random ones.
        n_classes: Number of outputs of a network with random weights; None takes the library's default.
    """

    spec: str
    name: str
    options: Mapping[str, str]
    pretrained: bool
    n_classes: int | None

    @property
    def size(self) -> int | None:
        """Side of the images that the network itself receives, if the spec overrides its config."""
        return self.whole_number("size")

    def whole_number(self, option: str) -> int | None:
        """Return the value of an option that is a positive whole number; None if it is not given."""
        text = self.options.get(option)
        if text is not None and not re.fullmatch(r"[1-9]\d{0,4}", text):
            raise InputError(f"model: {option}={text}: expected a whole number above 0")
        return None if text is None else int(text)


@dataclass(frozen=True)
class LibraryNetwork:
    """A network of a library; `classes` is None if the library does not name its outputs."""

    network: Preprocessed
    classes: tuple[str, ...] | None


TIMM_OPTIONS = ("pretrained", "size", "in_chans")
TORCHVISION_OPTIONS = ("pretrained", "size", "weights")
HF_OPTIONS = ("pretrained", "size", "revision")


# --------------------------------------------------------------------------------------------------- timm
def timm_network(asked: LibraryRequest) -> LibraryNetwork:
    """Build a network of timm: a name of `timm.list_models`, ``hf-hub:ID`` or ``local-dir:FOLDER``.

    Raises:
        InputError: an unknown name, a network without a classifier, or weights that timm cannot load.
    """
    timm = load_library("timm")
    arguments: dict[str, Any] = {} if asked.n_classes is None else {"num_classes": asked.n_classes}
    if "in_chans" in asked.options:
        arguments["in_chans"] = asked.whole_number("in_chans")
    if ":" not in asked.name:
        fixed = _timm_size_is_fixed(timm, asked.name)
        if asked.size and fixed:
            arguments["img_size"] = asked.size
    with _asking("timm", asked.spec, _WITHOUT_DOWNLOAD):
        network = timm.create_model(asked.name, pretrained=asked.pretrained, **arguments)
    if not network.num_classes:
        raise InputError(f"model: {asked.spec} has no classifier; choose a network with one")
    data = timm.data.resolve_model_data_config(network)
    n_channels, height, width = data["input_size"]
    n_channels = arguments.get("in_chans", n_channels)
    means, stds = ([sum(v) / len(v)] * n_channels if len(v) != n_channels else v for v in (data["mean"], data["std"]))
    interpolation: Interpolation = (
        data["interpolation"] if data["interpolation"] in ("nearest", "bilinear") else "bicubic"
    )
    shape = (n_channels, asked.size or height, asked.size or width)
    return LibraryNetwork(
        Preprocessed(network, shape, means, stds, interpolation=interpolation), _timm_classes(timm, network)
    )


def _timm_size_is_fixed(timm: Any, name: str) -> bool:
    """Look up a registry name: must the network be built for the size of its images?"""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise InputError(f"model: {unknown_name(name, timm.list_models(), 'model of timm')}")
    known = timm.list_models(f"{architecture}.*", pretrained=True)
    if name != architecture and name not in known:
        raise InputError(f"model: {unknown_name(name, known, 'model of timm')}")
    config = timm.get_pretrained_cfg(name)
    return config is not None and bool(config.fixed_input_size)


def _timm_classes(timm: Any, network: Any) -> tuple[str, ...] | None:
    """Names from the config, or from the ImageNet variant with as many classes; the first of synonyms."""
    config = network.pretrained_cfg
    names, words = config.get("label_names"), config.get("label_descriptions") or {}
    if not names:
        subset = timm.data.infer_imagenet_subset(network)
        if subset is None:
            return None
        info = timm.data.ImageNetInfo(subset)
        names, words = info.label_names(), info.label_descriptions(as_dict=True)
    if len(names) != network.num_classes:
        return None
    return distinct([str(words.get(name, name)).split(",")[0].strip() for name in names])


# --------------------------------------------------------------------------------------------------- torchvision
def torchvision_network(asked: LibraryRequest) -> LibraryNetwork:
    """Build a classifier of `torchvision.models`; its option "weights" names an entry such as IMAGENET1K_V2.

    Raises:
        InputError: an unknown name or entry, or weights that torchvision cannot load.
    """
    models = load_library("torchvision.models")
    known = models.list_models(module=models)
    if asked.name not in known:
        raise InputError(f"model: {unknown_name(asked.name, known, 'classifier of torchvision')}")
    entries = models.get_model_weights(asked.name)
    chosen = asked.options.get("weights", entries.DEFAULT.name)
    if chosen not in entries.__members__:
        raise InputError(f"model: {asked.spec}: {unknown_name(chosen, list(entries.__members__), 'entry of weights')}")
    entry = entries[chosen]
    own = entry.transforms()
    size = asked.size or own.crop_size[0]
    arguments: dict[str, Any] = {"weights": entry} if asked.pretrained else {}
    if asked.n_classes is not None:
        arguments["num_classes"] = asked.n_classes
    if asked.name.startswith("vit_"):
        arguments["image_size"] = size  # its position embeddings have one size
    with _asking("torchvision", asked.spec, _WITHOUT_DOWNLOAD):
        network = models.get_model(asked.name, **arguments)
    wrapped = Preprocessed(network, (3, size, size), own.mean, own.std, interpolation=own.interpolation.value)
    return LibraryNetwork(wrapped, distinct(entry.meta["categories"]))


# --------------------------------------------------------------------------------------------------- transformers
def hf_network(asked: LibraryRequest) -> LibraryNetwork:
    """Build an image classifier of transformers: an ID of the hub, or a folder written by `save_pretrained`.

    The image processor is needed too: it defines the preprocessing. No code of the repository runs.

    Raises:
        InputError: an unknown ID, weights without the classifier, or an image processor that does more than resize,
            crop, scale and normalise.
    """
    transformers = load_library("transformers")
    place = {"trust_remote_code": False, "revision": asked.options.get("revision", "main")}
    with _asking("transformers", asked.spec, "give an ID of the hub, or a folder with network and image processor"):
        config = transformers.AutoConfig.from_pretrained(asked.name, **place)
        processor = transformers.AutoImageProcessor.from_pretrained(asked.name, **place)
        if asked.n_classes is not None:
            config.num_labels = asked.n_classes
        if asked.size is not None and hasattr(config, "image_size"):
            config.image_size = asked.size
        network = _hf_module(transformers.AutoModelForImageClassification, asked, config, place)
        wrapped = _hf_preprocessed(network, processor.to_dict(), config, asked.size)
        _check_processor(processor, wrapped, asked.spec)
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    return LibraryNetwork(wrapped, None if all(map(_PLACEHOLDER.fullmatch, names)) else distinct(names))


def _hf_module(factory: Any, asked: LibraryRequest, config: Any, place: Mapping[str, Any]) -> nn.Module:
    if not asked.pretrained:
        made: nn.Module = factory.from_config(config, trust_remote_code=False)
        return made.float()
    network, loading = factory.from_pretrained(asked.name, config=config, output_loading_info=True, **place)
    if loading["missing_keys"]:
        raise InputError(
            f"model: {asked.spec} has no weights for {sorted(loading['missing_keys'])[0]}, so its answers would be "
            "random; choose a network that was trained to classify"
        )
    kept: nn.Module = network.float()  # configs may ask for half precision, but images come in float32
    return kept


def _hf_preprocessed(network: nn.Module, facts: Mapping[str, Any], config: Any, size: int | None) -> Preprocessed:
    n_channels = int(getattr(config, "num_channels", 3))
    place = (facts.get("crop_size") if facts.get("do_center_crop") else None) or facts.get("size") or {}
    edge = size or place.get("shortest_edge")
    height, width = (edge, edge) if edge else (int(place["height"]), int(place["width"]))
    scale = 255 * facts.get("rescale_factor", 1 / 255) if facts.get("do_rescale", True) else 255
    offset = 1 if facts.get("do_rescale", True) and facts.get("rescale_offset") else 0
    means, stds = (facts["image_mean"], facts["image_std"]) if facts.get("do_normalize") else ([0.0], [1.0])
    resample = facts.get("resample")
    return Preprocessed(
        network,
        (n_channels, height, width),
        _spread([(mean + offset) / scale for mean in means], n_channels),
        _spread([std / scale for std in stds], n_channels),
        interpolation="bilinear" if resample is None else _PILLOW_FILTERS.get(int(resample), "bilinear"),
        blue_first=bool(facts.get("do_flip_channel_order")),
    )


def _spread(values: Sequence[float], n_channels: int) -> list[float]:
    return list(values) * n_channels if len(values) == 1 else list(values)


def _check_processor(processor: Any, wrapped: Preprocessed, spec: str) -> None:
    """Compare the processor with our preprocessing on a picture of the network's size."""
    picture = np.random.default_rng(0).integers(0, 256, wrapped.input_shape, dtype=np.uint8)
    expected = processor(
        images=[picture], return_tensors="pt", do_resize=False, do_center_crop=False, input_data_format="channels_first"
    )["pixel_values"]
    bare = Preprocessed(nn.Identity(), wrapped.input_shape, blue_first=wrapped.blue_first)
    bare.mean, bare.std = wrapped.mean, wrapped.std
    found = bare(torch.from_numpy(picture)[None] / 255)
    # Float32 values up to 255, rescaled and normalised in another order.
    if expected.shape != found.shape or not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise InputError(
            f"model: the image processor of {spec} does more than resize, crop, scale and normalise; wrap "
            "the network in pnc.Preprocessed or a module of your own, and give it as py:FILE.py:FUNCTION"
        )


# --------------------------------------------------------------------------------------------------- for all three
def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Return names that all differ: outputs with a common name get their index appended.

    >>> distinct(["crane", "dog", "crane"])
    ('crane (0)', 'dog', 'crane (2)')
    """
    counts = Counter(names)
    return tuple(f"{name} ({index})" if counts[name] > 1 else name for index, name in enumerate(names))


def load_library(module: str) -> Any:
    """Import a module of an optional library.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f'model: the package {package} is needed for this; pip install "pnc[models]"') from error
    except RuntimeError as error:  # torchvision compiled for another build of torch
        reason = str(error).splitlines()[0]
        raise InputError(
            f"model: {package} is installed but cannot be imported ({reason}); install the build for this torch"
        ) from error


@contextmanager
def _asking(library: str, spec: str, way_out: str) -> Iterator[None]:
    """Turn any error of the library within the block into an InputError with its first line."""
    try:
        yield
    except PNCError:
        raise
    except Exception as error:  # noqa: BLE001 - foreign libraries, and whatever they download with
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model: {library} cannot load {spec}: {reason}; {way_out}") from error
