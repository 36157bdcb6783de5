"""Learning without forgetting: fine-tuning that keeps the target's answers on the available images.

Li and Hoiem, 2016 (arXiv:1606.09282). The distillation term is KL(target || tuned network, base classes), softened by a
temperature of 2. Deviations, both common by now: one softmax over all classes, and base samples of the support, if any,
are trained on.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from pnc.bench.rivals.rival import Budget, Fitted, Rival
from pnc.bench.rivals.tuning import Data, TuningMethod, grid, tune
from pnc.method.task import CloneTask

LEARNING_RATES = (0.1, 0.3, 0.03, 1.0)
WEIGHTS = (1.0, 3.0, 0.3)
TEMPERATURE = 2.0


def distillation(model: nn.Module, logits: Tensor, batch: Data, strength: float) -> Tensor:
    """KL divergence, in nats, from the target's softened answers to those of the tuned network among base classes."""
    told = (batch.base_logits / TEMPERATURE).log_softmax(1)
    found = (logits[:, : told.shape[1]] / TEMPERATURE).log_softmax(1)
    return strength * TEMPERATURE**2 * F.kl_div(found, told, log_target=True, reduction="batchmean")


def fit(task: CloneTask, budget: Budget) -> Fitted:
    """Tune everything, with distillation on every sample."""
    settings = grid(LEARNING_RATES, strengths=WEIGHTS)
    return tune(task, TuningMethod(settings, strength="distillation", term=distillation), budget)


RIVAL = Rival("LwF", "tuning", fit, {"learning_rate": LEARNING_RATES, "distillation": WEIGHTS})
