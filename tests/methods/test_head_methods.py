"""WA, BiC and SEQ*: numbers by hand, and which rows of the head change."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clpet.errors import ConfigError
from clpet.methods.bic import fit_correction
from clpet.methods.components.row_table import RowTable
from clpet.methods.seq_star import cosine_logits
from clpet.methods.wa import length_ratio
from clpet.training.step import StepContext
from tests.conftest import double, scores


def test_weight_alignment_by_hand() -> None:
    weight = double([[3, 4], [0, 2], [6, 8], [5, 12]])
    ratio = length_ratio(weight, 2)
    assert ratio.item() == pytest.approx(0.304348, abs=1e-6)
    assert (ratio * weight[2]).tolist() == pytest.approx([1.826087, 2.434783], abs=1e-6)
    assert length_ratio(torch.cat([weight[:2], ratio * weight[2:]]), 2).item() == pytest.approx(1)


def test_the_loss_of_wa_by_hand(make) -> None:
    """Two old labels and one new: the teacher's logits weigh two thirds."""
    run = make("method=wa")
    method, pool = run.method, run.data.train
    rows = pool.rows_of(0)[pool.labels[pool.rows_of(0)] == 2][:1]
    method.objective.add_labels([0, 1, 2])
    method.logits = lambda batch: double([[0.8, 0.2, 1.5]])
    method.old, method.teacher = 2, RowTable(rows, double([[1, 0.5]]), len(pool))
    assert method.loss(StepContext.of(pool.batch(rows))).item() == pytest.approx(0.647295, abs=1e-6)
    method.teacher = None
    cross_entropy = method.loss(StepContext.of(pool.batch(rows))).item()
    assert pytest.approx(cross_entropy / 3 + 2 / 3 * 0.685702, abs=1e-6) == 0.647295


@pytest.mark.parametrize(
    ("rows", "labels", "a", "b", "loss"),
    [([[2, 1, 3], [0.5, 1.5, 2], [1, 0, 0.5], [0, 1, 4]], [0, 1, 2, 2], 1e-3, 1.683012, 0.683553),
     ([[2, 1, 1], [0.5, 1.5, 2], [1, 0, 0.5], [0, 1, 4], [0.2, 0.1, 2]], [0, 1, 2, 2, 0], 0.299666, 0.492890, 0.858988)],
)  # fmt: skip
def test_bias_correction_by_hand(rows: list, labels: list[int], a: float, b: float, loss: float) -> None:
    """In the first case the best factor without a bound would be negative."""
    logits, targets = double(rows), torch.tensor(labels)
    fitted = fit_correction(logits, targets, 2)
    assert fitted == pytest.approx((a, b), abs=1e-6)
    logits[:, 2] = fitted[0] * logits[:, 2] + fitted[1]
    assert F.cross_entropy(logits, targets).item() == pytest.approx(loss, abs=1e-6)


def test_cosine_logits_by_hand() -> None:
    logits = cosine_logits(double([[2, 1]]), double([[1, 0], [0, 1], [1, 1]]), 1.0)
    assert logits[0].tolist() == pytest.approx([0.894427, 0.447214, 0.948683], abs=1e-6)
    assert F.cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(0.991458, abs=1e-6)
    assert F.cross_entropy(logits[:, :2], torch.tensor([0])).item() == pytest.approx(0.494335, abs=1e-6)


def test_wa_scales_the_rows_of_new_labels_alone(make) -> None:
    run = make("method=wa", "train.epochs=1", "method.shrink_only=false")
    run.learn(0)
    method, head = run.method, run.method.objective.head
    assert method.diagnostics() == {}
    correct, before = method.correct, []
    method.correct = lambda: (before.append(head.weight.detach().clone()), correct())[1]
    run.learn(1)
    ratio = method.diagnostics()["length_ratio"]
    assert torch.equal(head.weight[:4], before[0][:4])
    assert torch.allclose(head.weight[4:], ratio * before[0][4:])
    assert length_ratio(head.weight, 4).item() == pytest.approx(1, abs=1e-5)


def test_wa_lengthens_no_rows_unless_it_may(make) -> None:
    run = make("method=wa", "train.epochs=1")
    method, head = run.method, run.method.objective.head
    run.learn(0)
    run.learn(1)
    for length, factor in ((0.5, 1.0), (2.0, None)):  # of the new rows, in those of the old ones
        with torch.no_grad():
            head.weight[4:] *= length * head.weight[:4].norm(dim=1).mean() / head.weight[4:].norm(dim=1).mean()
            before = head.weight[4:].clone()
            figures = method.correct()
        assert figures["length_ratio"] == pytest.approx(1 / length, rel=1e-5)
        assert torch.allclose(head.weight[4:], before * (factor or 0.5), rtol=1e-5)


def test_the_correction_of_bic_is_bounded_where_all_is_right() -> None:
    """Four old and four new labels that are separated: without the ridge a grows to 10 and more."""
    logits = torch.eye(8, dtype=torch.float64).repeat(4, 1) * 8 + torch.linspace(0, 1, 8, dtype=torch.float64)
    targets = torch.arange(8).repeat(4)
    assert fit_correction(logits, targets, 4, ridge=0.01)[0] < 2
    assert fit_correction(logits, targets, 4)[0] > 4


@pytest.mark.slow
def test_bic_folds_its_correction_into_the_head(make) -> None:
    """Afterwards logits of new labels are a z + b, those of old ones what they were."""
    run = make("method=bic", "train.epochs=1", "replay.per_class=6", "replay.train_share=0.5")
    run.learn(0)
    method, seen = run.method, []
    correct = method.correct

    def spy() -> dict[str, float]:
        seen.append(method.embed(run.data.train.rows_of(1), method.logits))
        return correct()

    method.correct = spy
    run.learn(1)
    a, b = (method.diagnostics()[f"correction_{name}"] for name in "ab")
    corrected = method.embed(run.data.train.rows_of(1), method.logits)
    assert (a, b) != (1, 0)
    assert torch.equal(corrected[:, :4], seen[0][:, :4])
    assert torch.allclose(corrected[:, 4:], a * seen[0][:, 4:] + b, atol=1e-5)


def test_bic_learns_without_the_examples_that_correct_it(make) -> None:
    run = make("method=bic", "train.epochs=1", "replay.per_class=6", "replay.train_share=0.5")
    run.learn(0)
    run.learn(1)
    method, pool = run.method, run.data.train
    held_out = method.replay.held_out
    assert np.unique(pool.labels[held_out], return_counts=True)[1].tolist() == [3, 3, 3, 3]
    del method.replay.memory[1]  # selected after the task, also from those held out
    rows = np.concatenate(method.plan(1).epoch(0))
    assert not np.isin(held_out, rows).any()
    assert np.isin(np.setdiff1d(pool.rows_of(1), held_out), rows).all()
    assert method.diagnostics()["correction_a"] >= 1e-3


def test_bic_needs_two_held_out_examples(make) -> None:
    with pytest.raises(ConfigError, match="2 held-out examples of every label"):
        make("method=bic", "replay.per_class=6")


@pytest.mark.parametrize("head", ["cosine", pytest.param("linear", marks=pytest.mark.slow)])
def test_seq_star_freezes_the_backbone_and_old_rows(head: str, make) -> None:
    run = make("method=seq_star", f"method.head={head}", "method.warmup=1", "train.epochs=2", "train.weight_decay=0.1")
    method, seen = run.method, []
    step = method.end_step

    def spy(context) -> None:
        step(context)
        tensors = [*method.objective.adapters.tensors("default").values()]
        seen.append((context.epoch, torch.cat([value.detach().flatten() for value in tensors])))

    method.end_step = spy
    run.learn(0)
    epochs = [[value for epoch, value in seen if epoch == number] for number in (0, 1)]
    assert not torch.equal(epochs[0][0], epochs[0][-1])
    assert all(torch.equal(value, epochs[0][-1]) for value in epochs[1])
    weight, bias = (value.detach().clone() for value in (method.objective.head.weight, method.objective.head.bias))
    run.learn(1)
    assert torch.equal(seen[-1][1], epochs[0][-1])
    assert torch.equal(method.objective.head.weight[:4], weight)
    assert torch.equal(method.objective.head.bias[:4], bias)
    assert not torch.equal(method.objective.head.weight[4:], method.objective.head.start[4:8, :-1])
    dim = method.objective.dim
    assert method.trainable_parameters() == 4 * (dim + 1)  # rows of the second task alone
    rows = run.data.test.rows_of(1)
    with torch.no_grad():
        h = method.objective.features(run.data.test.batch(rows))
    products = method.heads()["default"].scatter(h)[:, :8].detach()
    if head == "cosine":
        products = products / h.norm(dim=1, keepdim=True)
    assert torch.allclose(products, scores(run, rows)[:, :8], atol=1e-5)
