"""Dark experience replay++: the base samples are the memory, with their labels and the target's logits.

Buzzega et al., 2020 (arXiv:2004.07211). In addition to cross-entropy on all samples, the squared distance keeps the
tuned network's base logits of the memory near the target's. Deviation: batches hold every class equally often, instead
of the paper's weight for the labels of the memory.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from pnc.bench.rivals.rival import Budget, Fitted, Rival, need_base_samples
from pnc.bench.rivals.tuning import Data, TuningMethod, grid, tune
from pnc.method.task import CloneTask

LEARNING_RATES = (0.1, 0.3, 0.03, 1.0)
WEIGHTS = (0.1, 0.3, 0.03)


def remembered_logits(model: nn.Module, logits: Tensor, batch: Data, strength: float) -> Tensor:
    """Mean squared distance between the base logits of base samples and the target's."""
    rows = batch.is_base
    return strength * F.mse_loss(logits[rows, : batch.base_logits.shape[1]], batch.base_logits[rows])


def fit(task: CloneTask, budget: Budget) -> Fitted:
    """Tune everything, with the target's logits of base samples as additional labels."""
    need_base_samples(task, "DER++")
    settings = grid(LEARNING_RATES, strengths=WEIGHTS)
    return tune(task, TuningMethod(settings, strength="logit_weight", term=remembered_logits), budget)


RIVAL = Rival("DER++", "tuning", fit, {"learning_rate": LEARNING_RATES, "logit_weight": WEIGHTS})
