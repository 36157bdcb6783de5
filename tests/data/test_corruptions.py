"""Corruptions: the strengths of the benchmark, values in [0, 1], and blur as in SciPy."""

import pytest
import torch
from scipy.ndimage import gaussian_filter

from pnc.data.corruptions import STRENGTHS, corrupted
from pnc.foundation.errors import InputError

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", STRENGTHS)
def test_a_higher_severity_is_further_from_the_image_and_all_values_stay_in_range(kind):
    made = [corrupted(IMAGES, kind, severity) for severity in (1, 2, 3)]
    assert all(one.min() >= 0 and one.max() <= 1 and one.shape == IMAGES.shape for one in made)
    away = [float((one - IMAGES).abs().mean()) for one in made]
    assert 0 < away[0] < away[1] < away[2]
    assert torch.equal(corrupted(IMAGES, kind, 2), made[1])


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_blur_agrees_with_scipy(severity):
    sigma = STRENGTHS["blur"][severity - 1]
    expected = gaussian_filter(IMAGES.double().numpy(), (0, 0, sigma, sigma), mode="mirror", radius=None, truncate=4.0)
    found = corrupted(IMAGES.double(), "blur", severity)
    # SciPy cuts its window at a rounded number of pixels, ours goes one further: the tail weighs less than 1e-4.
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=2e-4, rtol=0)


def test_contrast_keeps_the_mean_of_every_channel():
    found = corrupted(IMAGES, "contrast", 3)
    torch.testing.assert_close(found.mean((2, 3)), IMAGES.mean((2, 3)))
    torch.testing.assert_close(found.std(), 0.15 * IMAGES.std(), atol=0.01, rtol=0)


def test_noise_has_the_standard_deviation_of_the_benchmark():
    grey = torch.full((20, 3, 32, 32), 0.5)
    assert float((corrupted(grey, "noise", 1) - grey).std()) == pytest.approx(0.04, rel=0.02)
    assert not torch.equal(corrupted(grey, "noise", 1, seed=1), corrupted(grey, "noise", 1))


def test_what_is_unknown_is_refused():
    with pytest.raises(InputError, match="kind"):
        corrupted(IMAGES, "fog", 1)
    with pytest.raises(InputError, match="severity: expected 1, 2 or 3, got 5"):
        corrupted(IMAGES, "blur", 5)
