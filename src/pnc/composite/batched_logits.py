"""Networks run on many images, batch by batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pnc.data.image_set import images_as_float
from pnc.data.image_store import to_device
from pnc.foundation.network_state import evaluating, like_images
from pnc.graph.logits import pick_logits

Progress = Callable[[str, int, int], None]
"""Called with the name of the current work, the number of steps done, and the number of all."""


def logits_of(
    model: nn.Module,
    images: Tensor,
    batch_size: int = 64,
    progress: Progress | None = None,
    what: str = "",
    run: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Run a network in eval mode, batch by batch.

    Args:
        model: On any device, in any floating-point dtype; the images are moved and cast to match. Its output may be all
            that `record` accepts, such as an object with `logits`.
        images: (N, C, H, W), uint8 or floating point.
        batch_size: Images per batch.
        progress: Called after each batch with `what`, the number of images done and of all; None for nothing.
        what: The name of this work.
        run: What to call in place of the model, for example with a fixed set of clones.
    Returns:
        Logits (N, K) on the CPU.
    """
    like, logits, n_done = like_images(model), [], 0
    with evaluating(model):
        for batch in images.split(batch_size):
            answers = (run or model)(to_device(images_as_float(batch).to(like.dtype), like.device))
            logits.append(pick_logits(answers).cpu())
            n_done += len(batch)
            if progress is not None:
                progress(what, n_done, len(images))
    return torch.cat(logits)
