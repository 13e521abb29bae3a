"""train.class_weights: the weights by hand, their place in the loss of every method, and what they change."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clpet.api.run import train
from clpet.data.benchmark import Benchmark, Example, Task
from clpet.objectives.classification import balanced_weights
from clpet.training.step import StepContext
from tests.conftest import domain_args, methods_of, tiny_args


def test_balanced_weights_by_hand() -> None:
    """n / (k n_label) of each task; a label of two tasks has a weight in each."""
    rows = {"one": ["a", "a", "a", "b"], "two": ["b", "c"]}
    tasks = [Task(name, [Example("t", label) for label in labels], [], [], tuple(sorted(set(labels))))
             for name, labels in rows.items()]  # fmt: skip
    weights = balanced_weights(Benchmark("made", tasks, "{text}", 8))
    assert weights.tolist() == [pytest.approx([2 / 3, 2, 0]), pytest.approx([0, 1, 1])]


def test_an_example_counts_by_the_weight_of_its_label(make) -> None:
    run = make("method=sequential", "train.class_weights=balanced")
    objective = run.method.objective
    objective.add_labels(run.benchmark.seen_labels(2))
    rows = run.data.train.rows_of(0)[:6]
    objective.label_weights = torch.rand(objective.label_weights.shape, generator=torch.Generator().manual_seed(0))
    batch = run.data.train.batch(rows)
    single = [objective.loss(run.data.train.batch([row])) for row in rows]  # each already times its weight
    nll = F.cross_entropy(objective.logits(batch) + objective.task_label_mask[batch.tasks][:, objective.head.labels],
                          objective.targets(batch), reduction="none")  # fmt: skip
    weights = objective.label_weights[batch.tasks, batch.labels]
    assert objective.loss(batch).item() == pytest.approx((weights * nll).mean().item(), rel=1e-6)
    assert objective.loss(batch).item() == pytest.approx(sum(single).item() / 6, rel=1e-5), "independent of the batch"


@pytest.mark.parametrize("method", sorted(set(methods_of("classification")) - {"crl", "knn", "ncm", "slda"}))
def test_every_method_weights_its_cross_entropy(method: str, make) -> None:
    """Doubled weights add the weighted cross-entropy once more to the loss of the current task's batch."""
    run = make(f"method={method}", "train.class_weights=balanced", "train.epochs=1")
    run.learn(0)
    run.learn(1) if method != "joint" else None
    batch = run.data.train.batch(run.data.train.rows_of(1)[:4])
    objective = run.method.objective

    def loss(factor: float) -> float:
        torch.manual_seed(0)
        objective.label_weights = torch.full_like(objective.label_weights, factor)
        with torch.no_grad():
            return float(run.method.loss(StepContext.of(batch)))

    none, once, twice = loss(0), loss(1), loss(2)
    assert once > none
    assert twice - once == pytest.approx(once - none, rel=1e-3)


def test_a_rare_label_is_found_more_often(tmp_path: Path) -> None:
    """All texts of a label with 5 % of the examples also occur with the other label, which is more often correct."""
    texts = [("common", "tin")] * 60 + [("common", "oak")] * 16 + [("rare", "oak")] * 4
    for split in ("train", "test"):
        rows = [{"text": text, "label": label, "task": "t"} for label, text in texts]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recall(weights: str) -> float:
        run = train(*tiny_args(tmp_path), "method=sequential", f"train.class_weights={weights}", "train.lr=3e-2",
                    "train.epochs=6", "benchmark.validation_share=0",
                    output_dir=str(tmp_path / "out"), quiet=True)  # fmt: skip
        answers = [row["prediction"] for row in run.predictions(after=1).to_pylist() if row["label"] == "rare"]
        return answers.count("rare") / len(answers)

    assert recall("none") == 0
    assert recall("balanced") == 1


def test_without_labels_or_cross_entropy_weights_are_refused(clpet, words: Path, prose: Path) -> None:
    result = clpet("train", *domain_args(prose), "method=sequential", "train.class_weights=balanced")
    assert result.code == 2
    assert "train.class_weights is for labels, which objective=language_modeling does not have" in result.err
    result = clpet("train", *tiny_args(words), "method=crl", "replay=fixed", "train.class_weights=balanced")
    assert result.code == 2
    assert "train.class_weights weights the terms of a cross-entropy, which method=crl does not have" in result.err
