"""Joint training on all images of all classes, starting from the target's weights: a bound for tuning."""

from pnc.bench.rivals.rival import Budget, Fitted, Rival, need_base_samples
from pnc.bench.rivals.tuning import Hyperparameters, TuningMethod, train_once
from pnc.method.task import CloneTask

LEARNING_RATE = 0.05
EPOCHS = 4


def fit(task: CloneTask, budget: Budget) -> Fitted:
    """Tune everything for `EPOCHS` epochs, without a search."""
    need_base_samples(task, "joint training")
    n_steps = -(-EPOCHS * len(task.samples.labels) // budget.batch_size)
    return train_once(task, TuningMethod([Hyperparameters(LEARNING_RATE, n_steps=n_steps)]), budget)


RIVAL = Rival("joint training on everything", "bound", fit, sees_everything=True)
