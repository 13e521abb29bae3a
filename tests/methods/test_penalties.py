"""EWC and LwF in the variants of other papers, against numbers computed by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from clpet.methods import lwf
from clpet.methods.components.second_weights import SecondWeights
from clpet.methods.ewc import Merge, merged
from clpet.methods.replay import Static
from clpet.training.step import StepContext
from tests.conftest import double


def test_ewc_penalty_around_the_newest_weights(make) -> None:
    """The penalty at theta = [1, 2], theta* = [.5, 2.5], F = [2, 4], lambda = 400 is 300, its gradient [400, -800]."""
    method = make("method=ewc", "method.strength=400", "method.merge=average").method
    theta, star, fisher = nn.Parameter(torch.tensor([1.0, 2.0])), double([0.5, 2.5]), double([2, 4])
    method.named_parameters = lambda: {"x": theta}
    method.quadratic = {"x": (fisher, fisher * star, fisher * star.square())}
    method.prepare(0)
    method.penalty().backward()
    assert method.penalty().item() == pytest.approx(300, rel=1e-5)
    assert theta.grad.tolist() == pytest.approx([400, -800], rel=1e-5)


@pytest.mark.parametrize(("kind", "expected"), [("sample", [5, 2]), ("batch", [4, 1])])
def test_fisher_of_examples_and_of_batches(kind: str, expected: list[float], make, monkeypatch) -> None:
    """Gradients [1, 2] and [3, 0] are squared one by one, or their mean is squared."""
    method = make("method=ewc", f"method.fisher={kind}").method
    theta, gradients = nn.Parameter(torch.zeros(2)), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    method.named_parameters = lambda: {"x": theta}
    monkeypatch.setattr(method.data.train, "rows_of", lambda *tasks: np.array([0, 1]))
    monkeypatch.setattr(Static, "loss", lambda self, context: (gradients[context.rows] @ theta).mean())
    assert method.information(0)["x"].tolist() == expected


def test_merged_fisher() -> None:
    """Averages [3, 3] and [3, 2], sum [9, 6], decayed [7.95, 5.22]."""
    merged_by = {}
    for how in (Merge.average, Merge.sum, Merge.decay):
        total, steps = double([5, 2]), []
        for count, new in enumerate(([1, 4], [3, 0]), 1):
            total = merged(total, double(new), count, how, 0.9)
            steps.append(total.tolist())
        merged_by[how] = steps
    assert merged_by[Merge.average] == [[3, 3], [3, 2]]
    assert merged_by[Merge.sum][1] == [9, 6]
    assert merged_by[Merge.decay][1] == pytest.approx([7.95, 5.22])


@pytest.mark.parametrize("merge", ["average", "sum", "decay"])
def test_merged_ewc_is_centred_on_the_newest_weights(merge: str, make) -> None:
    """After a task the penalty is 0 at its weights, and rows of later labels are not penalised."""
    run = make("method=ewc", f"method.merge={merge}", "method.fisher=batch", "method.strength=100")
    run.learn(0)
    run.learn(1)
    run.method.prepare(2)
    assert run.method.penalty().item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        run.method.objective.head.weight[8:] += 5
    assert run.method.penalty().item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        run.method.objective.head.weight[:4] += 5
    assert run.method.penalty().item() > 1e-3


def test_lwf_divergence() -> None:
    """KL(old || new) at T = 2 times 4, never the reverse (2.2436); zero for equal logits."""
    old, new = double([[3, 0, -2]]), double([[0, 1, 0]])
    assert lwf.divergence(old, new, 2).item() == pytest.approx(2.1155131044, abs=1e-9)
    assert lwf.divergence(old, new, 1).item() == pytest.approx(1.2760785078, abs=1e-9)
    assert lwf.divergence(old.repeat(3, 1), new.repeat(3, 1), 2).item() == pytest.approx(2.1155131044, abs=1e-9)
    assert lwf.divergence(old, old, 2).item() == pytest.approx(0, abs=1e-12)
    grads = []
    for form in (lwf.divergence, lwf.distillation):
        z = new.clone().requires_grad_()
        form(old, z, 2).backward()
        grads.append(z.grad)
    assert torch.allclose(*grads)


WORDS = ["objective=text_to_text", "model=tiny_llama", "benchmark.max_target=10", "train.epochs=1"]


def test_lwf_of_answers_is_a_divergence_over_their_tokens(make) -> None:
    """CE + lambda T^2 mean over target tokens of KL(old || new), T = 2; the teacher is the model before the task."""
    run = make("method=lwf", "method.strength=3", "train.lr=1e-2", *WORDS)
    method, rows = run.method, run.data.train.rows_of(1)
    run.learn(0)
    trained = method.named_parameters()
    method.teacher_weights = SecondWeights(method, trained)
    batch = run.data.train.batch(rows)
    ce = method.objective.loss(batch)
    assert method.loss(StepContext.of(batch)).item() == pytest.approx(ce.item(), rel=1e-6)  # student = teacher
    old = method.logits(batch).detach()
    with torch.no_grad():
        for value in trained.values():
            value.add_(0.05)
    now = {name: value.detach().clone() for name, value in trained.items()}
    new = method.logits(batch).detach().double()
    p = (old.double() / 2).softmax(1)
    kl = (p * (p.log() - (new / 2).log_softmax(1))).sum(1).mean()
    assert len(old) == run.data.train.weights[rows].sum()
    loss = method.loss(StepContext.of(batch))
    assert loss.item() == pytest.approx(method.objective.loss(batch).item() + 3 * 4 * kl.item(), rel=1e-5)
    assert kl > 1e-3
    loss.backward()
    assert all(torch.equal(value, now[name]) for name, value in trained.items())
    chunks = [rows[:7], rows[7:]]
    shares = [run.data.train.weights[chunk].sum() / len(old) for chunk in chunks]
    summed = sum(
        method.loss(StepContext.of(run.data.train.batch(chunk))) * share
        for chunk, share in zip(chunks, shares, strict=True)
    )
    assert summed.item() == pytest.approx(loss.item(), rel=1e-5)
    run.learn(1)
    assert all(torch.equal(value, now[name]) for name, value in method.teacher_weights.tensors.items())
    assert method.stored_parameters() == 2 * method.trainable_parameters()


def test_ewc_of_answers_squares_the_gradient_of_a_batch(make) -> None:
    """F = (gradient of the mean over a batch's answer tokens)^2, penalty 5000 / 2 sum F (theta - theta*)^2."""
    form = ["method.fisher=batch", "method.merge=average", "method.strength=5000"]
    run = make("method=ewc", *form, *WORDS, "train.global_batch_size=100")
    run.learn(0)
    named = run.method.named_parameters()
    loss = run.method.objective.loss(run.data.train.batch(run.data.train.rows_of(0)))
    grads = torch.autograd.grad(loss, list(named.values()))
    expected = {name: grad.double().square() for name, grad in zip(named, grads, strict=True)}
    for name, (fisher, *_) in run.method.quadratic.items():
        torch.testing.assert_close(fisher, expected[name], rtol=1e-3, atol=1e-12)
    run.method.prepare(1)
    with torch.no_grad():
        for value in named.values():
            value.add_(0.1)
    sums = sum(value.sum().item() for value in expected.values())
    assert run.method.penalty().item() == pytest.approx(2500 * 0.01 * sums, rel=1e-3)
