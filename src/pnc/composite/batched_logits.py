"""Networks run on many images, batch by batch."""

import torch
from torch import Tensor, nn

from pnc.data.image_set import images_as_float
from pnc.data.image_store import to_device
from pnc.foundation.network_state import evaluating, like_images


def logits_of(model: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """Run a network in eval mode, batch by batch.

    Args:
        model: On any device, in any floating-point dtype; the images are moved and cast to match.
        images: (N, C, H, W), uint8 or floating point.
        batch_size: Images per batch.
    Returns:
        Logits (N, K) on the CPU.
    """
    like = like_images(model)
    with evaluating(model):
        batches = (to_device(images_as_float(batch).to(like.dtype), like.device) for batch in images.split(batch_size))
        return torch.cat([model(batch).cpu() for batch in batches])
