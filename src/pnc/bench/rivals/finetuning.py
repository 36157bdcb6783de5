"""Fine-tuning: parameters of the target are trained by cross-entropy, with or without the base samples of the support.

Without them (no replay) the target is trained on new classes only; base samples of the support, if any, only help to
choose the setting.
"""

from collections.abc import Sequence

from pnc.bench.rivals.rival import Budget, Fitted, Rival, need_base_samples
from pnc.bench.rivals.tuning import Scope, TuningMethod, grid, tune
from pnc.method.task import CloneTask

LEARNING_RATES = (0.1, 0.03, 0.3, 0.01, 1.0, 0.003)
HEAD_LEARNING_RATES = (0.1, 0.03, 0.3, 0.01, 1.0, 0.003, 3.0, 0.001, 10.0, 0.0003, 30.0, 0.0001)
TRAIN_NORM = (True, False)


def _rival(name: str, scope: Scope, replay: bool) -> Rival:
    rates: Sequence[float] = HEAD_LEARNING_RATES if scope == "head" else LEARNING_RATES
    norms: Sequence[bool] = (False,) if scope == "head" else TRAIN_NORM

    def fit(task: CloneTask, budget: Budget) -> Fitted:
        if replay:
            need_base_samples(task, "fine-tuning with replay")
        return tune(task, TuningMethod(grid(rates, norms), scope=scope, replay=replay), budget)

    return Rival(name, "tuning", fit, {"learning_rate": rates, "train_norm": norms})


WITH_REPLAY = _rival("fine-tuning with replay", "all", replay=True)
RIVALS = (
    _rival("fine-tuning", "all", replay=False),
    _rival("fine-tuning (last stage)", "last stage", replay=False),
    _rival("fine-tuning (head)", "head", replay=False),
    WITH_REPLAY,
    _rival("fine-tuning with replay (last stage)", "last stage", replay=True),
    _rival("fine-tuning with replay (head)", "head", replay=True),
)
