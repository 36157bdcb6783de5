import numpy as np
import torch
from sklearn.linear_model import Ridge

from pnc.method.localization import paper_surrogate
from pnc.method.localization.paper_surrogate import GRID, explanations, neighbourhoods, surrogate_loss


def around(n_images=2, n_neighbours=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n_images, 3, 12, 12, generator=generator, dtype=torch.float64)
    return images, neighbourhoods(images, generator, n_neighbours)


def test_neighbours_show_the_image_or_its_mean_colour_patch_by_patch():
    images, near = around()
    assert near.images.shape == (80, 3, 12, 12)
    assert near.uncovered.shape == (2, 40, GRID * GRID)
    for sample, neighbour in ((0, 0), (0, 7), (1, 39)):
        shown = near.images[40 * sample + neighbour]
        for patch, seen in enumerate(near.uncovered[sample, neighbour].tolist()):
            rows, columns = (slice(4 * n, 4 * n + 4) for n in divmod(patch, GRID))
            original = images[sample][:, rows, columns]
            expected = original if seen else images[sample].mean((1, 2))[:, None, None].expand_as(original)
            torch.testing.assert_close(shown[:, rows, columns], expected)  # mean + (image - mean)


def test_the_sample_itself_comes_first_and_weights_fall_with_what_is_covered():
    images, near = around()
    torch.testing.assert_close(near.images[::40], images)  # mean + (image - mean)
    assert near.weights[:, 0].tolist() == [1.0, 1.0]
    order = near.uncovered.sum(2)[0].argsort()
    weights = near.weights[0][order]
    assert bool((weights.diff() >= 0).all()) and float(weights[0]) < 0.9
    covered = 1 - float(near.uncovered[:, 1:].mean())
    assert abs(covered - paper_surrogate.COVERED) < 0.06  # 702 draws


def test_explanations_are_those_of_scikit_learn():
    _, near = around()
    answers = torch.randn(80, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = explanations(near, answers)
    for sample in range(2):
        design = torch.cat([near.uncovered[sample], torch.ones(40, 1)], 1).numpy()
        ridge = Ridge(alpha=paper_surrogate.RIDGE, fit_intercept=False)
        ridge.fit(design, answers[40 * sample : 40 * (sample + 1)].numpy(), near.weights[sample].numpy())
        np.testing.assert_allclose(found[sample].numpy(), ridge.coef_.T, rtol=1e-6, atol=1e-9)  # another solver


def test_the_loss_is_zero_for_equal_answers_and_blind_to_what_is_not_linear_nearby():
    _, near = around()
    answers = torch.randn(80, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert float(surrogate_loss(near, answers, answers)) == 0.0
    assert float(surrogate_loss(near, torch.zeros_like(answers), answers)) == 1.0
    more = answers.clone().requires_grad_(True)
    surrogate_loss(near, more * 1.1, answers).backward()
    assert bool(more.grad.isfinite().all()) and float(more.grad.abs().sum()) > 0
