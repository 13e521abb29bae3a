"""SLM: what the training of a task changes, and what a text retrieves."""

import numpy as np
import pytest
import torch

from clpet.config.schema import Training
from clpet.objectives.base import AnswerSpace
from clpet.replay.batch_plan import BatchPlan
from clpet.training.optimizers import Optimizer
from clpet.training.step import StepContext

# Learning


def test_before_training_a_task_changes_nothing(slm) -> None:
    """With new values the model equals the frozen backbone, which stage 1 does not use."""
    run = slm()
    batch = run.data.test.batch(np.arange(6))
    bare = run.method.objective.features(batch)
    run.trainer.settings.lr = 0.0
    run.learn(0)
    cost = run.method.objective.meter.take_learning()
    assert cost["forward_examples"] == 24 * run.config.train.epochs  # stage 2 alone
    used = torch.arange(4)
    with run.method.stack.selected_branches(torch.rand(6, 4), used), torch.no_grad():
        assert torch.equal(run.method.objective.features(batch), bare)


def test_no_gradient_crosses_the_stages(slm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 trains keys only, stage 2 none; the optimiser has parameters of the current task only."""
    run, optimised = slm(), []
    start = Optimizer.__init__

    def record(self: Optimizer, named: dict, settings: Training) -> None:
        optimised.append(list(named.values()))
        start(self, named, settings)

    monkeypatch.setattr(Optimizer, "__init__", record)
    run.learn(0)
    run.learn(1)
    method = run.method
    assert len(optimised) == 2
    current = [*method.stack.current().values(), *method.task_heads.heads[1].parameters()]
    assert {id(tensor) for tensor in optimised[1]} == {id(tensor) for tensor in current}
    for tensor in current:
        tensor.grad = None
    method.loss(StepContext.of(run.data.train.batch(run.data.train.rows_of(1)[:6]))).backward()
    assert all(keys.grad is None and not keys.requires_grad for keys in method.key_pool)
    assert all(
        p.grad is None
        for p in [*method.task_heads.heads[0].parameters(), *method.objective.adapters.model.parameters()]
    )
    assert any((tensor.grad != 0).any() for tensor in current)


def everything(method) -> dict[str, torch.Tensor]:
    """Keys, values and head rows by task."""
    tensors = {}
    for task, keys in enumerate(method.key_pool):
        tensors[f"{task} keys"] = keys.clone()
        rows = slice(task * method.per_task * method.rank, (task + 1) * method.per_task * method.rank)
        for name, layer in method.stack.state().items():
            tensors[f"{task} {name} A"], tensors[f"{task} {name} B"] = (
                layer["A"][rows].clone(),
                layer["B"][:, rows].clone(),
            )
        for name, value in method.task_heads.heads[task].named_parameters():
            tensors[f"{task} head {name}"] = value.detach().clone()
    return tensors


@pytest.mark.parametrize("values", ["shared", "per_group"])
def test_earlier_tasks_keep_their_bits(values: str, slm) -> None:
    """Keys, values and head rows of earlier tasks do not change, even with weight decay."""
    run = slm(f"method.values={values}", "method.top_k=2", "train.weight_decay=0.5", "benchmark.softmax=seen")
    before: dict[str, torch.Tensor] = {}
    for task in range(3):
        run.learn(task)
        after = everything(run.method)
        assert len(before) < len(after)
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), name
        assert all(tensor.abs().sum() > 0 for tensor in after.values())
        before = after


def test_later_tasks_leave_what_an_input_retrieved_as_it_was(slm) -> None:
    """Similarities to old keys and, if the same keys are retrieved, old logits stay bit-identical for a text alone."""
    run = slm("method.top_k=2")
    run.learn(0)
    pool, method = run.data.test, run.method
    batch = pool.batch(pool.rows_of(0)[:1])
    with torch.no_grad():
        sigma, before = method.similarities(batch, method.key_pool), method.predict(batch, AnswerSpace([0]))
    run.learn(1)
    run.learn(2)
    with torch.no_grad():
        assert torch.equal(method.similarities(batch, method.key_pool)[:, :, :4], sigma)
        after = method.predict(batch, AnswerSpace([0]))
        assert torch.equal(after.scores[:, :4], before.scores[:, :4])
        assert not torch.equal(after.scores[:, 4:], before.scores[:, 4:])  # their heads are there now
        mixed = pool.batch(np.concatenate([pool.rows_of(0)[:1], pool.rows_of(2)[:3]]))
        assert torch.allclose(method.predict(mixed, AnswerSpace([0])).scores[0], after.scores[0], atol=1e-6)


def test_tasks_can_be_learned_in_any_order(slm) -> None:
    """Keys, values and heads of a task are bit-identical at any position in the order."""
    learned = []
    for order in (["fruit", "metal", "river"], ["river", "fruit", "metal"]):
        run = slm("method.head=per_task", f"benchmark.order=[{','.join(order)}]", distance=None)
        pool = run.data.train
        run.method.plan = lambda index, pool=pool: BatchPlan(pool, 1, lambda epoch: [pool.rows_of(index)])
        for task in range(3):
            run.learn(task)
        pieces = everything(run.method)
        learned.append({f"{order[int(key[0])]}{key[1:]}": value for key, value in pieces.items()})
    assert learned[0].keys() == learned[1].keys()
    assert all(torch.equal(learned[0][key], learned[1][key]) for key in learned[0])


# Answering


def test_separated_tasks_are_not_forgotten(slm) -> None:
    """Every text retrieves its task's keys, and accuracy among the task's labels does not drop."""
    run = slm("train.epochs=8", "method.stage1.min_steps=600")
    scores = []
    for task in range(3):
        run.learn(task)
        evaluation = run.evaluate(task + 1)
        scores.append([evaluation.per_task[i].value for i in range(3)])
        figures = run.method.diagnostics()
        names = run.benchmark.names[: task + 1]
        assert figures["right_picks"] == 100
        assert all(figures[f"vote/{name}"] == figures[f"picks/{name}"] == 100 for name in names)
        assert evaluation.diagnostics["selector_average"] == 100
    assert scores[2][2] > 80
    assert min(scores[0][0], scores[1][1]) > 80
    assert scores[2][:2] == [scores[0][0], scores[1][1]]


def test_equal_tasks_are_confused_and_a_task_id_helps(slm) -> None:
    """Retrieval at chance costs accuracy, which the same model keeps if the task id is given."""
    run = slm("train.epochs=8", distance=0.0)
    for task in range(3):
        run.learn(task)
    evaluation = run.evaluate(3)
    assert run.method.diagnostics()["right_picks"] < 60
    seen, by_task = (np.mean([scores[i].value for i in range(3)]) for scores in (evaluation.seen, evaluation.per_task))
    assert by_task > seen + 10
    given = slm("train.epochs=8", "method.head=per_task", distance=0.0)
    for task in range(3):
        given.learn(task)
    with_task_id = given.evaluate(3)
    assert given.method.task_id_at_test
    assert np.mean([with_task_id.seen[i].value for i in range(3)]) >= seen
    assert given.method.diagnostics()["right_picks"] == 100
    assert with_task_id.seen == with_task_id.per_task


def test_the_known_task_view_uses_the_keys_of_the_task(slm) -> None:
    """Texts that retrieved other tasks' keys are predicted again; all others keep their scores."""
    run = slm("method.top_k=2", "method.stage1.min_steps=600", distance=0.5)
    for task in range(3):
        run.learn(task)
    method, pool = run.method, run.data.test
    batch = pool.batch(np.arange(len(pool)))
    with torch.no_grad():
        predictions = method.predict(batch, AnswerSpace(range(12)))
        known_task = method.predict_known_task(batch, predictions)
        expected = method.predict_retrieved(batch, AnswerSpace([], batch.tasks))
    right = predictions.extras["right_picks"] == 1
    assert right.any()
    assert not right.all()
    assert torch.equal(known_task.scores[right], predictions.scores[right])
    labels = method.objective.task_label_mask[batch.tasks] == 0
    assert torch.allclose(known_task.scores[labels], expected.scores[labels], atol=1e-5)
    assert not torch.allclose(known_task.scores[labels], predictions.scores[labels], atol=1e-3)


def test_batch_mean_reads_one_task_at_a_time(slm) -> None:
    """A batch of one text equals instance retrieval; evaluation batches contain one task; mixed batches differ."""
    run = slm("method.retrieval=batch_mean", "method.top_k=2", distance=2.0)
    for task in range(3):
        run.learn(task)
    method, pool = run.method, run.data.test
    with torch.no_grad():
        single = method.predict(pool.batch([0]), AnswerSpace(range(12)))
        same = method.predict(pool.batch([0, 0, 0]), AnswerSpace(range(12)))
        assert torch.allclose(same.scores, single.scores.expand(3, -1), atol=1e-5)
        mixed = method.predict(pool.batch([0, int(pool.rows_of(2)[0])]), AnswerSpace(range(12)))
        assert not torch.allclose(mixed.scores[:1], single.scores, atol=1e-3)
    batches = method.batches(pool, np.arange(len(pool)))
    assert all(len(set(pool.tasks[rows])) == 1 for rows in batches)
    assert sorted(np.concatenate(batches)) == list(range(len(pool)))


def test_a_text_does_not_depend_on_its_batch(slm) -> None:
    run = slm("method.values=per_group", "method.top_k=2", distance=0.5)
    for task in range(3):
        run.learn(task)
    pool = run.data.test
    with torch.no_grad():
        together = run.method.predict(pool.batch(np.arange(24)), AnswerSpace(range(12)))
        for row in range(0, 24, 5):
            alone = run.method.predict(pool.batch([row]), AnswerSpace(range(12)))
            assert torch.allclose(alone.scores[0], together.scores[row], atol=1e-5)
            assert alone.extras["right_picks"][0] == together.extras["right_picks"][row]
