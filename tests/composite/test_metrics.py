import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from pnc.composite.metrics import auroc, calibration_error, conditional_kl, leak, locality_kl, measure_logits, shifted
from pnc.foundation.errors import InputError

GENERATOR = torch.Generator().manual_seed(0)
TARGET = torch.randn(200, 3, generator=GENERATOR)
NEW = torch.randn(200, 2, generator=GENERATOR)
LABELS = torch.randint(5, (200,), generator=GENERATOR)


def test_accuracies_agree_with_scikit_learn():
    logits = torch.cat([TARGET, NEW], 1)
    found = measure_logits(logits, LABELS, TARGET)
    right = (logits.argmax(1) == LABELS).int()
    is_new = (LABELS >= 3).int()
    # per group, accuracy equals the recall of "is right"
    expected = balanced_accuracy_score(is_new, torch.where(right.bool(), is_new, 1 - is_new))
    assert found.average_accuracy == pytest.approx(expected, abs=1e-12)
    assert found.average_accuracy == (found.base_accuracy + found.new_accuracy) / 2


def test_added_columns_leave_the_conditional_distribution_alone():
    logits = torch.cat([TARGET, NEW], 1)
    # only the float64 rounding of log_softmax
    assert conditional_kl(logits, TARGET) < 1e-12
    moved = logits.clone()
    moved[:, 0] += 1
    assert conditional_kl(moved, TARGET) > 1e-3


def test_locality_is_conditional_plus_what_leaks():
    logits = torch.cat([TARGET + 0.3 * torch.randn(200, 3, generator=GENERATOR), NEW], 1)
    escaped = logits.double().softmax(1)[:, 3:].sum(1)
    expected = conditional_kl(logits, TARGET) - float((1 - escaped).log().mean())
    assert locality_kl(logits, TARGET) == pytest.approx(expected, rel=1e-9)  # float64 sums in another order
    assert leak(logits, 3) == pytest.approx(float(escaped.mean()), rel=1e-12)


def test_base_drop_counts_what_the_new_classes_took():
    labels = TARGET.argmax(1).clone()
    labels[:10] = 3
    logits = torch.cat([TARGET, torch.full((200, 2), -100.0)], 1)
    assert measure_logits(logits, labels, TARGET).base_drop == 0
    logits[50:145, 3] = 100
    assert measure_logits(logits, labels, TARGET).base_drop == pytest.approx(95 / 190)


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), "must be"),
        (torch.zeros(4, 5), torch.zeros(3, dtype=torch.long), "must be"),
        (torch.zeros(4, 5), torch.zeros(4, dtype=torch.long), "only one kind"),
    ],
)
def test_wrong_shapes_and_one_sided_labels_are_refused(logits, labels, words):
    with pytest.raises(InputError, match=words):
        measure_logits(logits, labels, torch.zeros(4, 3))


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_the_calibration_error_agrees_with_scikit_learn(n_bins):
    logits = 2 * torch.cat([TARGET, NEW], 1).double()
    confidence, predicted = logits.softmax(1).max(1)
    right = (predicted == LABELS).numpy()
    accuracies, means = calibration_curve(right, confidence.numpy(), n_bins=n_bins)
    counts, _ = np.histogram(confidence.numpy(), n_bins, (0, 1))
    expected = (np.abs(accuracies - means) * counts[counts > 0]).sum() / len(right)
    assert calibration_error(logits, LABELS, n_bins) == pytest.approx(expected, rel=1e-9)


def test_confident_and_right_is_no_error_confident_and_wrong_is_the_largest():
    logits = 1000.0 * torch.eye(4)
    assert calibration_error(logits, torch.arange(4)) == 0
    assert calibration_error(logits, torch.tensor([1, 2, 3, 0])) == 1


def test_the_auroc_of_old_against_new_agrees_with_scikit_learn_and_no_shift_changes_it():
    logits = torch.cat([TARGET, NEW], 1)
    odds = (logits[:, 3:].double().logsumexp(1) - logits[:, :3].double().logsumexp(1)).numpy()
    assert auroc(logits, LABELS, 3) == pytest.approx(roc_auc_score((LABELS >= 3).numpy(), odds))
    assert auroc(shifted(logits, 3, 5.0), LABELS, 3) == pytest.approx(auroc(logits, LABELS, 3))
    same = torch.zeros(200, 5)
    assert auroc(same, LABELS, 3) == 0.5


def test_a_shift_moves_new_logits_against_base_ones_only():
    logits = torch.cat([TARGET, NEW], 1)
    moved = shifted(logits, 3, -2.0)
    assert torch.equal(moved[:, :3], TARGET)
    torch.testing.assert_close(moved[:, 3:].softmax(1), NEW.softmax(1))
    assert leak(moved, 3) < leak(logits, 3)
    assert torch.equal(shifted(logits, 3, 0.0), logits)
