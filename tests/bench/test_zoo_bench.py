"""The bench of the zoo: rivals' scores against their definitions, and the whole bench on digits."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import kendalltau

import pnc
from digits import BASE, NEW, network
from pnc.bench import zoo as zoo_bench
from pnc.bench.result_files import Cells
from pnc.bench.transfer_scores import leep, logme, nearest_mean
from pnc.bench.zoo import Query, bench
from pnc.bench.zoo_networks import SOURCES, TARGETS, Images
from pnc.bench.zoo_report import CLONE, LOOK, RANK, clear_order, kendall, results
from pnc.data.image_set import sample_per_class
from pnc.models.model_specs import build_model


def rows(n: int = 30, n_features: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    return torch.randn(n, n_features, generator=generator) + labels[:, None] * 0.7, labels


@pytest.mark.parametrize("n_features", [6, 25])
def test_logme_is_the_largest_evidence(n_features: int) -> None:
    features, labels = (one.double() if one.is_floating_point() else one for one in rows(n_features=n_features))
    n, found = len(labels), []
    for label in range(3):
        wanted = (labels == label).double()

        def lost(logs: Any, wanted: torch.Tensor = wanted) -> float:
            alpha, beta = math.exp(logs[0]), math.exp(logs[1])
            covariance = torch.eye(n).double() / beta + features @ features.T / alpha
            normal = torch.distributions.MultivariateNormal(torch.zeros(n).double(), covariance, validate_args=False)
            return -float(normal.log_prob(wanted))

        found.append(-minimize(lost, (1.0, 1.0), method="Nelder-Mead").fun / n)
    assert logme(features, labels) == pytest.approx(sum(found) / 3, abs=1e-3)


def test_leep_is_its_definition() -> None:
    features, labels = rows()
    answers = features[:, :4].softmax(1)
    total = 0.0
    for i in range(len(labels)):
        likely = 0.0
        for z in range(4):
            joint = sum(float(answers[j, z]) for j in range(len(labels)) if labels[j] == labels[i])
            likely += joint / float(answers[:, z].sum()) * float(answers[i, z])
        total += math.log(likely)
    assert leep(answers, labels) == pytest.approx(total / len(labels), abs=1e-6)
    certain = torch.nn.functional.one_hot(labels, 4).float()
    assert leep(certain, labels) == pytest.approx(0, abs=1e-6)
    assert leep(torch.full((30, 4), 0.25), labels) == pytest.approx(math.log(1 / 3))


def test_nearest_mean_is_held_out() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.05]])
    labels, folds = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 0])
    assert nearest_mean(features, labels, folds).tolist() == [True, True, True, True, False]


def test_kendall_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        xs, ys = torch.randint(0, 6, (2, 15), generator=generator).tolist()
        assert kendall(xs, ys) == pytest.approx(kendalltau(xs, ys).statistic)
    assert kendall([1, 1, 1], [1, 2, 3]) == 0


def test_only_clear_differences_count_in_the_clear_order() -> None:
    assert clear_order([1, 2, 3], [0.50, 0.51, 0.60]) == 1
    assert clear_order([2, 1, 3], [0.50, 0.51, 0.60]) == 1
    assert clear_order([3, 2, 1], [0.50, 0.51, 0.60]) == -1
    assert clear_order([1, 2], [0.5, 0.5]) == 0


def test_the_plans_name_different_networks_and_every_query_lacks_its_classes() -> None:
    names = [plan.name for plan in (*TARGETS, *SOURCES)]
    assert len(names) == len(set(names)) and len(SOURCES) >= 30 and len(zoo_bench.QUERIES) == 20
    targets = {plan.name: plan for plan in TARGETS}
    for query in zoo_bench.QUERIES:
        known = targets[query.target].classes
        assert targets[query.target].data == query.data
        assert isinstance(known, slice) or not set(known) & set(query.classes)


def test_the_bench_measures_every_query_and_continues(tmp_path: Path) -> None:
    train, test = pnc.load_data("digits", "train"), pnc.load_data("digits", "test")
    images = Images(train, sample_per_class(train, 30, "last"), sample_per_class(test, 20, "first"))
    zoo = pnc.Zoo(tmp_path / "zoo", create=True)
    zoo.add("knows", network(NEW))
    for seed in range(3):
        zoo.add(f"untrained{seed}", build_model("zoo:cnn?width=0.25", NEW, (1, 8, 8), seed))
    queries = [Query("target-digits", "digits", ("7", "8", "9"))]
    one = bench(zoo, lambda _: network(BASE), lambda _: images, 2, queries=queries)

    def measured() -> list:
        return list(one.measure(Cells(tmp_path / "zoo.jsonl", one.settings, one.keys), None))

    found = measured()
    written = (tmp_path / "zoo.jsonl").read_bytes()
    assert measured() == found and (tmp_path / "zoo.jsonl").read_bytes() == written
    parts = [row["part"] for row in found]
    assert (parts.count(LOOK), parts.count(RANK)) == (4, 1) and 2 <= parts.count(CLONE) <= 3
    (result,) = results(found)
    assert result.n_cloned == parts.count(CLONE) and result.regrets["pnc"] <= 0.1 and -1 <= result.taus["pnc"] <= 1
    claims = {one.claim: one for one in one.claims(found)}
    assert claims["2 processes, one killed: the ranking is that of one process"].holds
    assert claims["trained sources"].value == 4 and not claims["trained sources"].holds
    assert "| digits + 7, 8, 9 |" in one.markdown(found) and "LogME" in one.markdown(found)
