"""DER and DER++: numbers by hand, a memory that is filled at every step, and gradients that are those of the loss."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clpet.data.micro_batches import MicroBatchLimits
from clpet.methods.components.memory_gradient import mean_gradient
from clpet.methods.derpp import distance
from clpet.replay.sampled import ReservoirReplay
from clpet.training.step import StepContext
from tests.conftest import double

NOW, DRAWN = double([[1, -0.5, 0.25, 2], [0, 1, 0.5, -1]]), double([[0.6, 0.2, -0.4, 1.1], [0.3, -0.7, 0.9, 0]])
STORED = double([[1.5, -1, 0], [-0.2, 1.4, 0.1]])


def test_the_loss_by_hand() -> None:
    """Stored logits of three columns are compared with the first three of four."""
    new = F.cross_entropy(double([[2, 0, -1, 0.5], [0.1, 0.2, 0.3, 0.4]]), torch.tensor([3, 2]))
    old = F.cross_entropy(DRAWN, torch.tensor([1, 2]))
    assert distance(NOW, STORED).item() == pytest.approx(0.153750, abs=1e-6)
    assert (new + 0.3 * distance(NOW, STORED)).item() == pytest.approx(1.638568, abs=1e-6)
    assert (new + 0.3 * distance(NOW, STORED) + 0.5 * old).item() == pytest.approx(2.256977, abs=1e-6)
    padded = F.pad(STORED, (0, 1), value=math.inf)  # a column that was not there does not count
    assert distance(NOW, padded) == distance(NOW, STORED)


def test_a_reservoir_by_hand() -> None:
    memory = ReservoirReplay(capacity=3)
    memory.memory, memory.num_seen, draws = {}, 0, iter([1, 3, 0, 5, 2])
    rng = SimpleNamespace(integers=lambda count: next(draws))
    assert memory.offer(np.arange(5), rng).tolist() == [0, 1, 2, 1, -1]
    assert memory.offer(np.arange(5, 8), rng).tolist() == [0, -1, 2]
    assert memory.memory[0].tolist() == [5, 3, 7]


def test_stored_logits_are_those_from_before_the_step(make) -> None:
    run = make("method=derpp", "replay.capacity=40")
    method, rows = run.method, run.data.train.rows_of(0)[:5]
    method.grow_head(0)
    expected = method.embed(rows, method.logits)
    method.before_step(StepContext(0, "", 0, 0, rows, run.data.train))
    assert method.replay.memory_rows().tolist() == rows.tolist()
    assert torch.allclose(method.stored_logits, expected)
    assert method.drawn == []  # there was nothing to draw yet


@pytest.mark.slow
def test_the_memory_keeps_its_size_and_has_logits_of_all_columns_seen(make) -> None:
    run = make("method=derpp", "replay.capacity=10", "train.epochs=1")
    run.learn(0)
    assert run.method.replay.num_seen == 24
    run.learn(1)
    assert run.method.stored_logits.shape == (10, 8)
    tasks = run.data.train.tasks[run.method.replay.memory_rows()]
    assert run.method.stored_logits.isinf()[:, 4:].all(1).tolist() == (tasks == 0).tolist()


@pytest.mark.parametrize("draws", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_terms(draws: int, make) -> None:
    """Those that are added are alpha d MSE + beta d CE, and do not depend on micro-batches."""
    run = make("method=derpp", f"method.draws={draws}", "method.alpha=0.3", "method.beta=0.7", "method.memory_batch=6")
    run.learn(0)
    method, pool, parameters = run.method, run.data.train, run.method.parameters()
    for size in (None, 4):
        method.objective.micro_batches = MicroBatchLimits(size)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        method.before_step(context := StepContext(1, "", 0, 0, pool.rows_of(1)[:3], pool))
        method.adjust_gradients(context)
        assert len(method.drawn) == draws
        loss = torch.zeros(())
        for number, (rows, stored) in enumerate(method.drawn):
            logits = method.logits(pool.batch(rows))
            loss = loss + (0.3 * distance(logits, stored) if number == 0 else 0)
            loss = loss + (0.7 * method.objective.cross_entropy(logits, pool.batch(rows)) if number == draws - 1 else 0)
        for one, two in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            assert torch.allclose(one.grad, two, atol=1e-6)


def test_der_has_no_labels_of_old_examples(make) -> None:
    run = make("method=der", "method.alpha=0")
    run.learn(0)
    method, pool = run.method, run.data.train
    method.before_step(StepContext(1, "", 0, 0, pool.rows_of(1)[:3], pool))
    ((rows, stored),) = method.drawn
    terms = method.memory_terms(rows, stored, method.alpha, method.beta)
    assert all((one == 0).all() for one in mean_gradient(method, rows, method.parameters(), terms))


def test_a_teacher_is_the_model_from_before_the_task(make) -> None:
    """For answers in words: at the first step of a task its logits are the model's, so that the distance is 0."""
    run = make("method=derpp", "model=tiny_llama", "objective=text_to_text", "benchmark.max_target=8", "train.epochs=1",
               "method.beta=0")  # fmt: skip
    method, distances = run.method, []
    adjust = method.adjust_gradients

    def spy(context: StepContext) -> None:
        if method.teacher is not None:
            rows, stored = method.drawn[0]
            with torch.no_grad():
                distances.append(method.memory_terms(rows, stored, 1.0, 0.0)(np.arange(len(rows))).item())
        adjust(context)

    method.adjust_gradients = spy
    run.learn(0)
    assert distances == []
    run.learn(1)
    assert distances[0] == pytest.approx(0, abs=1e-10)
    assert distances[-1] > 1e-6
    assert method.stored_logits.numel() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [("replay=share", "set replay=reservoir"),
     ("objective=text_to_text method.logits_from=stored model=tiny_llama", "set it to teacher")],
)  # fmt: skip
def test_refusals(options: str, message: str, make) -> None:
    with pytest.raises(Exception, match=message):
        make("method=derpp", *options.split())
