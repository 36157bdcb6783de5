"""How Partial Network Cloning chooses channels, as we read it: behave like the source around each sample.

Neighbours of each sample of the classes to clone are made by covering patches of the image. A linear model of the
source's answers over the patches, fitted with weights that fall with the distance from the sample, explains the source
there; masks are learned so that the masked source has the same explanation. This uses the source alone.

Source: Ye, Liu, Wang, CVPR 2023 (arXiv:2303.10597), whose equations we do not quote, and Ribeiro et al., KDD 2016
(arXiv:1602.04938) for local surrogates. Deviation: patches of a regular grid in place of superpixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 3
N_NEIGHBOURS = 16
COVERED = 0.3
WIDTH = 0.5
RIDGE = 1e-2


@dataclass(frozen=True)
class Neighbourhoods:
    """Perturbed neighbours of S samples, N of each; the first is the sample itself.

    Attributes:
        images: (S * N, C, H, W), sample by sample.
        uncovered: Which patches of the grid are visible, (S, N, GRID * GRID), 0 or 1.
        weights: Closeness to the sample, (S, N), 1 for the sample itself.
    """

    images: Tensor
    uncovered: Tensor
    weights: Tensor


def neighbourhoods(images: Tensor, generator: torch.Generator, n_neighbours: int = N_NEIGHBOURS) -> Neighbourhoods:
    """Cover random patches of images with the image's mean colour.

    Args:
        images: (S, C, H, W).
        generator: Draws the patches.
        n_neighbours: Neighbours of each image, including itself.
    """
    n_images, n_channels, height, width = images.shape
    seen = torch.rand(n_images, n_neighbours, GRID * GRID, generator=generator) >= COVERED
    seen[:, 0] = True
    uncovered = seen.to(images.dtype)
    masks = F.interpolate(uncovered.reshape(-1, 1, GRID, GRID), (height, width), mode="nearest").to(images.device)
    mean = images.mean((2, 3), keepdim=True).repeat_interleave(n_neighbours, 0)
    copies = images.repeat_interleave(n_neighbours, 0)
    distance = 1 - uncovered.mean(2).sqrt()  # one minus the cosine of the angle to the fully visible sample
    return Neighbourhoods(
        images=mean + (copies - mean) * masks,
        uncovered=uncovered.to(images.device),
        weights=torch.exp(-((distance / WIDTH) ** 2)).to(images.device),
    )


def explanations(around: Neighbourhoods, answers: Tensor) -> Tensor:
    """Fit a weighted ridge regression of a network's answers on the visible patches, one for each sample.

    Args:
        around: S samples, N neighbours each, with P patches.
        answers: The network's logits, (S * N, K).
    Returns:
        Effect of each patch, and the intercept last, (S, P + 1, K).
    """
    n_samples, n_neighbours, n_patches = around.uncovered.shape
    design = torch.cat([around.uncovered, around.uncovered.new_ones(n_samples, n_neighbours, 1)], 2)
    weighted = design * around.weights[:, :, None]
    penalty = RIDGE * torch.eye(n_patches + 1, dtype=design.dtype, device=design.device)
    gram = weighted.transpose(1, 2) @ design + penalty
    right = weighted.transpose(1, 2) @ answers.unflatten(0, (n_samples, n_neighbours))
    solved: Tensor = torch.linalg.solve(gram, right)
    return solved


def surrogate_loss(around: Neighbourhoods, answers: Tensor, expected: Tensor) -> Tensor:
    """Squared distance between the explanations of two networks, relative to the expected one; a scalar.

    Args:
        around: The neighbourhoods that both networks saw.
        answers: Logits of the masked source, (S * N, K).
        expected: Logits of the source, (S * N, K).
    """
    wanted = explanations(around, expected)
    return (explanations(around, answers) - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
