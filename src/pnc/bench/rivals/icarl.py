"""iCaRL: fine-tuning with distillation, then the nearest mean of exemplars in the tuned network's features.

Rebuffi et al., 2017 (arXiv:1611.07725). Every class keeps as many exemplars as the base class with the fewest samples,
chosen one after the other by herding, so that their mean stays nearest to that of all samples of the class. Deviations:
softmax with distillation instead of one sigmoid per class, because the target was not trained with sigmoids; negative
squared distances are scaled to logits, which changes no prediction.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.bench.rivals.lwf import LEARNING_RATES, WEIGHTS, distillation
from pnc.bench.rivals.nearest_mean import NearestMean, best_scale
from pnc.bench.rivals.rival import Budget, Fitted, Rival, need_base_samples
from pnc.bench.rivals.tuning import Data, TuningMethod, grid, tune
from pnc.method.task import CloneTask


def fit(task: CloneTask, budget: Budget) -> Fitted:
    """Tune everything, then replace the classifier by the nearest mean of exemplars."""
    need_base_samples(task, "iCaRL")
    classifier, n_classes = task.target.head.module, task.n_base + len(task.new_classes)

    @torch.no_grad()
    def by_exemplars(model: nn.Module, data: Data) -> nn.Module:
        model.set_submodule(str(classifier), nn.Identity())
        rows = torch.cat([model(inputs).float() for inputs in data.inputs.split(task.batch_size)])
        features = F.normalize(rows, dim=1)
        n_exemplars = int(data.labels[data.is_base].bincount().min())
        means = [herded(features[data.labels == label], n_exemplars).mean(0) for label in range(n_classes)]
        return nn.Sequential(model, NearestMean(*best_scale(features, torch.stack(means), data.labels)))

    settings = grid(LEARNING_RATES, strengths=WEIGHTS)
    return tune(task, TuningMethod(settings, strength="distillation", term=distillation, finish=by_exemplars), budget)


def herded(features: Tensor, number: int) -> Tensor:
    """Choose `number` rows of (N, D), or all if there are fewer, so that their mean stays near the mean of all."""
    mean, total = features.mean(0), torch.zeros_like(features[0])
    left, chosen = list(range(len(features))), []
    for count in range(1, min(number, len(features)) + 1):
        distances = ((total + features[left]) / count - mean).square().sum(1)
        chosen.append(left.pop(int(distances.argmin())))
        total = total + features[chosen[-1]]
    return features[chosen]


RIVAL = Rival("iCaRL", "tuning", fit, {"learning_rate": LEARNING_RATES, "distillation": WEIGHTS})
