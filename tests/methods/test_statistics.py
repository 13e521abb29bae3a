"""NCM and SLDA: numbers by hand, independence of the order, and runs that train nothing."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from clpet.methods.ncm import NCM
from clpet.methods.slda import SLDA, Update
from clpet.methods.statistics import FeatureStatistics
from tests.conftest import double

X, LABELS = double([[3, 4], [0, 2], [-1, 0], [-3, 1]]), torch.tensor([0, 0, 1, 1])


def empty(method: FeatureStatistics) -> FeatureStatistics:
    """A method with two labels and features of two numbers."""
    method.benchmark, method.objective = SimpleNamespace(labels=["a", "b"]), SimpleNamespace(dim=2, device="cpu")
    method.init_adapters()
    return method


def test_nearest_class_mean_by_hand() -> None:
    method = empty(NCM())
    method.add(F.normalize(X, dim=1), LABELS)
    means = F.normalize(method.means(), dim=1)
    assert torch.allclose(means, double([[0.316228, 0.948683], [-0.987087, 0.160182]]), atol=1e-6)
    assert method.scores(F.normalize(double([[2, 1]]), dim=1)).tolist()[0] == pytest.approx(
        [-0.585786, -3.622484], abs=1e-6
    )


@pytest.mark.parametrize(
    ("update", "covariance", "scores"),
    [(Update.exact, [[1.625, 0.5], [0.5, 0.625]], [7.897065, 2.590991]),
     (Update.published, [[2.041667, 0.375], [0.375, 0.6875]], [6.587250, 1.381075])],
)  # fmt: skip
def test_linear_discriminant_analysis_by_hand(update: Update, covariance: list, scores: list[float]) -> None:
    method = empty(SLDA(update=update))
    method.add(X, LABELS)
    assert torch.allclose(method.scatter / 4, double(covariance), atol=1e-6)
    assert method.scores(double([[1, 3]])).tolist()[0] == pytest.approx(scores, abs=1e-6)


def test_the_exact_covariance_does_not_depend_on_how_examples_arrive() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 2, generator=generator).double(), torch.arange(60) % 2
    whole, parts = empty(SLDA()), empty(SLDA())
    whole.add(features, labels)
    for rows in torch.randperm(60, generator=generator).split(7):
        parts.add(features[rows], labels[rows])
    centred = features - torch.stack([features[labels == label].mean(0) for label in (0, 1)])[labels]
    assert torch.allclose(whole.scatter, centred.T @ centred, rtol=1e-12)
    assert torch.allclose(parts.scatter, whole.scatter, rtol=1e-9)
    assert torch.allclose(parts.scores(X), whole.scores(X), rtol=1e-9)


@pytest.mark.parametrize("method", ["ncm", "slda"])
def test_nothing_is_trained_and_the_order_of_tasks_does_not_matter(method: str, make) -> None:
    scores = []
    for order in ("[fruit,metal,river]", "[river,fruit,metal]"):
        run = make(f"method={method}", f"benchmark.tasks={order}")
        for index in range(3):
            run.learn(index)
        assert run.method.trainable_parameters() == 0
        assert run.method.objective.meter.cost.backward_examples == 0
        batch = run.data.test.batch(run.data.test.rows_of(run.benchmark.names.index("metal")))
        values = run.method.predict(batch, run.method.choices(batch, range(12))).scores
        scores.append(values[:, [run.benchmark.label_ids[label] for label in ("iron", "fig", "nile")]])
    assert torch.allclose(*scores, atol=1e-4)


def test_a_label_without_examples_is_not_predicted(make) -> None:
    run = make("method=slda")
    run.learn(0)
    batch = run.data.test.batch(run.data.test.rows_of(2))
    scores = run.method.predict(batch, run.method.choices(batch, range(12))).scores
    assert scores[:, run.benchmark.task_labels(2)].eq(float("-inf")).all()
    assert scores[:, run.benchmark.task_labels(0)].isfinite().all()


def test_another_adapter_is_refused(clpet) -> None:
    result = clpet("train", "method=slda", "peft=lora", "model=tiny")
    assert result.code == 2
    assert "method=slda needs peft=frozen, not lora" in result.err
