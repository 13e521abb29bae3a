"""A-GEM, GEM and ER-ACE: numbers by hand, conflicts that are removed, and micro-batches that change nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clpet.data.batches import Batch
from clpet.data.micro_batches import MicroBatchLimits
from clpet.methods.components.memory_gradient import conflict, dot, dual_weights, memory_gradient
from clpet.methods.er_ace import ERACE
from clpet.training.step import StepContext
from tests.conftest import double

G = double([1, -2, 0.5])
TWO, OTHER = [[-1, 1, 2], [0.5, 1, -1]], [[-1, 1, 2], [1, 0, 0]]


@pytest.mark.parametrize(
    ("reference", "expected"),
    [([-1, 1, 2], [0.666667, -1.666667, 1.166667]), ([-0.25, 1, 0.5], [0.619048, -0.476190, 1.261905]),
     ([1, 0, 0], [1, -2, 0.5]), ([0, 0, 0], [1, -2, 0.5])],
)  # fmt: skip
def test_a_gem_by_hand(reference: list[float], expected: list[float]) -> None:
    r = double(reference)
    assert (G - conflict([G], [r]) * r).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_gradient_is_one_vector_over_all_tensors() -> None:
    """Projecting every tensor for itself would keep the first entry, which alone does not conflict."""
    gradient, reference = [double([1.0]), double([-2.0, 0.5])], [double([1.0]), double([1.0, 2.0])]
    assert dot(gradient, reference) == 0
    assert conflict(gradient, [reference[0], 2 * reference[1]]) == pytest.approx(-1 / 21)


@pytest.mark.parametrize(
    ("rows", "margin", "ridge", "scale", "weights", "expected"),
    [(TWO, 0, 1e-3, 1, [0.666356, 1.332534], [0.999911, -0.001110, 0.500178]),
     (OTHER, 0, 1e-3, 1, [0.333278, 0], [0.666722, -1.666722, 1.166556]),
     (OTHER, 0.5, 1e-3, 1, [0.5, 0.5], [1, -1.5, 1.5]),
     ([[-1, 1, 2]], 0, 1e-3, 0.01, [0.125], [0.00875, -0.01875, 0.0075]),  # an absolute ridge hardly projects
     ([[-1, 1, 2]], 0, 6e-3, 1, [0.333000], [0.667000, -1.667000, 1.166001])],  # relative: 1e-3 times |m|^2 = 6
)  # fmt: skip
def test_gem_by_hand(rows: list, margin: float, ridge: float, scale: float, weights: list, expected: list) -> None:
    matrix, g = scale * np.array(rows, dtype=float), scale * G.numpy()
    v = dual_weights(matrix @ g, matrix @ matrix.T, margin, ridge)
    assert v.tolist() == pytest.approx(weights, abs=1e-6)
    assert (g + matrix.T @ v).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", ["agem", "gem"])
def test_no_step_conflicts_with_the_memory(method: str, make) -> None:
    """With all stored examples in the reference, no gradient has a negative product with theirs after the projection."""
    more = ["method.memory_batch=999"] if method == "agem" else ["method.ridge=1e-9"]
    run = make(f"method={method}", "replay=share", "replay.share=0.5", "train.lr=1e-2", *more)
    run.learn(0)
    run.learn(1)
    products = []
    adjust = run.method.adjust_gradients

    def spy(context: StepContext) -> None:
        named = [parameter for parameter in run.method.parameters() if parameter.grad is not None]
        old = [memory_gradient(run.method, rows, named) for rows in memories(run.method)]
        before = [float(dot([p.grad for p in named], one)) for one in old]
        adjust(context)
        products.append((before, [float(dot([p.grad for p in named], one)) for one in old]))

    run.method.adjust_gradients = spy
    run.learn(2)
    assert any(min(before) < -1e-4 for before, _ in products)
    assert all(min(after) > -1e-5 for _, after in products)
    assert all(after == before for before, after in products if min(before) >= 0)


def memories(method) -> list[np.ndarray]:
    """The groups of stored rows with which a method's gradient must not conflict."""
    return method.memories() if hasattr(method, "memories") else [method.replay.memory_rows()]


def test_the_gradient_of_the_memory_does_not_depend_on_micro_batches(make) -> None:
    run = make("method=agem", "replay=share", "replay.share=1")
    run.learn(0)
    parameters, rows = run.method.parameters(), run.method.replay.memory_rows()
    whole = memory_gradient(run.method, rows, parameters)
    run.method.objective.micro_batches = MicroBatchLimits(5)
    for one, two in zip(whole, memory_gradient(run.method, rows, parameters), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


LOGITS = torch.tensor([[1, 0.5, 2, -0.5], [0.2, -0.1, 0.4, 0.9], [0.5, 1.5, -1, 0.2]])


def er_ace(make, classes: str, tasks: list[int], labels: list[int]):
    """ER-ACE in its second task with LOGITS as those of a batch: two new examples and an old one."""
    run = make("method=er_ace", f"method.classes={classes}", "benchmark.task=null", "benchmark.classes_per_task=2")
    method: ERACE = run.method
    method.objective.add_labels(range(4))
    pool = run.data.train
    pool.tasks[:3], pool.labels[:3] = tasks, labels
    method.logits = lambda batch: LOGITS[torch.from_numpy(batch.rows)]
    return method, pool


def loss_of(method: ERACE, pool, *chunks: list[int]) -> float:
    """The loss of the batch of rows 0, 1, 2 in micro-batches, as the trainer sums it."""
    rows, total = np.arange(3), 0.0
    context = StepContext(1, "", 0, 0, rows, pool)
    method.before_step(context)
    for chunk in chunks:
        batch: Batch = pool.batch(chunk)
        context.micro_batch = type(batch)(**{**vars(batch), "share": len(chunk) / 3})
        total += method.loss(context).item() * len(chunk) / 3
    return total


@pytest.mark.parametrize("classes", ["task", "batch"])
def test_er_ace_by_hand(classes: str, make) -> None:
    """New examples of the labels 3 and 2, which alone compete, and an old one of label 1 among all four."""
    method, pool = er_ace(make, classes, [1, 1, 0], [3, 2, 1])
    new = F.cross_entropy(LOGITS[:2, 2:], torch.tensor([1, 0]))
    old = F.cross_entropy(LOGITS[2:], torch.tensor([1]))
    assert new.item() == pytest.approx(1.776483, abs=1e-5)
    assert old.item() == pytest.approx(0.543775, abs=1e-5)
    assert loss_of(method, pool, [0, 1, 2]) == pytest.approx(2.320258, abs=1e-5)
    assert loss_of(method, pool, [0], [1, 2]) == pytest.approx(2.320258, abs=1e-5)


def test_a_batch_of_one_label_has_no_loss_if_its_labels_alone_compete(make) -> None:
    method, pool = er_ace(make, "batch", [1, 1, 0], [3, 3, 1])
    assert loss_of(method, pool, [0, 1, 2]) == pytest.approx(0.543775, abs=1e-5)


def test_gem_leaves_a_gradient_that_is_not_finite_to_the_trainer(make) -> None:
    run = make("method=gem", "replay=share")
    run.learn(0)
    parameters = run.method.parameters()
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    run.method.adjust_gradients(StepContext(1, "", 0, 0, run.data.train.rows_of(1)[:4], run.data.train))
    assert all(parameter.grad.isnan().all() for parameter in parameters)
