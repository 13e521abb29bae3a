"""EWC and LwF in the forms that other papers use."""

import numpy as np
import pytest
import torch
from torch import nn

from clpet.methods import lwf
from clpet.methods.ewc import Merge, merged
from clpet.methods.replay import Static

from .conftest import double


def test_ewc_penalty_around_the_newest_weights(make) -> None:
    """Oracle 3: theta = [1, 2], theta* = [.5, 2.5], F = [2, 4], lambda = 400: 300 and [400, -800]."""
    method = make("method=ewc", "method.strength=400", "method.merge=average").method
    theta, star, fisher = nn.Parameter(torch.tensor([1.0, 2.0])), double([0.5, 2.5]), double([2, 4])
    method.named = lambda: {"x": theta}
    method.quadratic = {"x": (fisher, fisher * star, fisher * star.square())}
    method.prepare(0)
    method.penalty().backward()
    assert method.penalty().item() == pytest.approx(300, rel=1e-5)
    assert theta.grad.tolist() == pytest.approx([400, -800], rel=1e-5)


@pytest.mark.parametrize(("kind", "expected"), [("sample", [5, 2]), ("batch", [4, 1])])
def test_fisher_of_examples_and_of_batches(kind: str, expected: list[float], make, monkeypatch) -> None:
    """Oracle 3: gradients [1, 2] and [3, 0] squared one by one, or their mean squared."""
    method = make("method=ewc", f"method.fisher={kind}").method
    theta, gradients = nn.Parameter(torch.zeros(2)), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    method.named = lambda: {"x": theta}
    monkeypatch.setattr(method.data.train, "rows_of", lambda *tasks: np.array([0, 1]))
    monkeypatch.setattr(Static, "loss", lambda self, batch: (gradients[batch.rows] @ theta).mean())
    assert method.information(0)["x"].tolist() == expected


def test_merged_fisher() -> None:
    """Oracle 3: averages [3, 3] and [3, 2], sum [9, 6], decayed [7.95, 5.22]."""
    found = {}
    for how in (Merge.average, Merge.sum, Merge.decay):
        total, steps = double([5, 2]), []
        for count, new in enumerate(([1, 4], [3, 0]), 1):
            total = merged(total, double(new), count, how, 0.9)
            steps.append(total.tolist())
        found[how] = steps
    assert found[Merge.average] == [[3, 3], [3, 2]]
    assert found[Merge.sum][1] == [9, 6]
    assert found[Merge.decay][1] == pytest.approx([7.95, 5.22])


@pytest.mark.parametrize("merge", ["average", "sum", "decay"])
def test_merged_ewc_is_centred_on_the_newest_weights(merge: str, make) -> None:
    """After a task the penalty is zero at its weights, and rows of labels to come are free."""
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
    """Oracle 4: KL(old || new) at T = 2 times 4, never the reverse (2.2436); zero for equal logits."""
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
