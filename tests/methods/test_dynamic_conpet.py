"""Dynamic ConPET against hand-computed numbers (numbered in the docstrings)."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clpet.methods.base import AnswerSpace
from clpet.methods.dynamic_conpet import force_true_task
from clpet.methods.modular import module_name
from clpet.objectives.classification import MISSING
from clpet.training.step import StepContext


def test_masked_cross_entropy_and_its_gradient(make) -> None:
    """The K = 1 loss of a batch by the full formula equals that of its new half alone."""
    new = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([2.0, 0.0], dtype=torch.float64)
    gap = torch.full((2,), MISSING, dtype=torch.float64)
    z = torch.stack([torch.cat([gap, new]), torch.cat([old, gap])])
    losses = F.cross_entropy(z, torch.tensor([2, 0]), reduction="none")
    assert losses.tolist() == pytest.approx([0.3132617, 0.1269280], abs=1e-7)
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(0.2200948, abs=1e-7)
    assert new.grad.tolist() == pytest.approx([-0.1344707, 0.1344707], abs=1e-7)
    full, new.grad = new.grad.clone(), None
    short = F.cross_entropy(new[None], torch.tensor([0])) * (1 / 2)
    short.backward()
    assert short.item() == pytest.approx(0.1566309, abs=1e-7)
    assert torch.allclose(new.grad, full, rtol=1e-12, atol=0)


def test_a_missed_gold_label_costs_a_hundred() -> None:
    z = torch.tensor([[1.0, 0.0, MISSING]], dtype=torch.float64)
    assert F.cross_entropy(z, torch.tensor([2])).item() == pytest.approx(101.3132617, abs=1e-7)


def test_union_of_two_modules() -> None:
    z = torch.tensor([2.0, 0.0, 1.0, 3.0])
    assert z.softmax(0).tolist() == pytest.approx([0.23688, 0.03206, 0.08714, 0.64391], abs=1e-5)
    assert z.argmax().item() == 3


def learned(make, *overrides: str, tasks: int = 3):
    run = make("method=dynamic_conpet", *overrides)
    for index in range(tasks):
        run.learn(index)
    return run


def batch_of(run, rows=None):
    pool = run.data.test
    return pool.batch(np.arange(len(pool)) if rows is None else rows)


def test_frozen_modules_keep_their_bits(make) -> None:
    """Parameters of module j < k are bitwise unchanged by task k, their logits equal the cached ones."""
    run = learned(make, "method.top_k=2", tasks=2)
    method = run.method
    before = {k: v.clone() for k, v in method.objective.adapters.tensors(module_name(0)).items()}
    head = method.modules[0].weight.detach().clone()
    pool, everything = run.data.train, np.arange(len(run.data.train))
    cached = method.cache.get(module_name(0), pool, everything)
    run.learn(2)
    after = method.objective.adapters.tensors(module_name(0))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(head, method.modules[0].weight)
    with torch.no_grad(), method.objective.adapters.using(module_name(0)):
        now = method.modules[0](method.objective.features(pool.batch(everything)))
    np.testing.assert_allclose(cached[:, :4], now.numpy(), atol=1e-5)


def test_an_oracle_selector_forgets_nothing(make, monkeypatch) -> None:
    """With K = 1 and a perfect selector, predictions for task j never change."""
    run = make("method=dynamic_conpet")
    monkeypatch.setattr(
        run.method, "ranking", lambda pool, rows: pool.tasks[rows].clip(max=len(run.method.modules) - 1)[:, None]
    )
    answers = []
    for index in range(3):
        run.learn(index)
        pool = run.data.test
        batch = pool.batch(pool.rows_of(0))
        with torch.inference_mode():
            labels = run.benchmark.seen_labels(index + 1)
            choices = AnswerSpace(labels)
            answers.append(choices.mask(run.method.predict(batch, choices).scores).argmax(1))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_correct_needs_correctly_selected(make) -> None:
    """With K = 1, #correct <= #correctly selected."""
    run = learned(make)
    batch, choices = batch_of(run), AnswerSpace(range(12))
    with torch.inference_mode():
        predictions = run.method.predict(batch, choices)
    correct = (choices.mask(predictions.scores).argmax(1) == batch.labels).sum()
    assert correct <= (predictions.extras["selected"] == batch.tasks).sum()


def test_as_many_modules_as_tasks_need_no_selector(make) -> None:
    """With K >= number of tasks all heads are concatenated, and there is no selector."""
    run = learned(make, "method.top_k=3")
    method, batch = run.method, batch_of(run)
    assert "selector" not in method.objective.adapters.names
    with torch.inference_mode():
        scores = method.predict(batch, AnswerSpace(range(12))).scores
        logits = []
        for index in range(3):
            with method.objective.adapters.using(module_name(index)):
                logits.append(method.modules[index](method.objective.features(batch)))
    labels = [label for head in method.modules for label in head.labels]
    assert torch.allclose(scores[:, labels], torch.cat(logits, 1), atol=1e-6)


def test_selector_head_growth_keeps_old_rows(make) -> None:
    """Old rows and biases are identical right after the expansion."""
    run = learned(make, tasks=2)
    selector = run.method.router.head
    weight, bias = selector.weight.detach().clone(), selector.bias.detach().clone()
    h = torch.randn(50, run.method.objective.dim)
    before = selector(h)[:, :2].argmax(1)
    selector.grow([2])
    assert torch.equal(selector.weight[:2], weight)
    assert torch.equal(selector.bias[:2], bias)
    assert torch.equal(selector(h)[:, :2].argmax(1), before)


def test_teacher_forcing_replaces_the_last_selected() -> None:
    """The true task is always in the set, whose size stays K."""
    selected = np.array([[0, 1], [2, 0], [1, 2]])
    forced = force_true_task(selected, np.array([3, 0, 1]))
    assert forced.tolist() == [[0, 3], [2, 0], [1, 2]]


def test_teacher_forcing_is_for_training_only(make) -> None:
    """At test the modules are those that the selector ranks highest."""
    run = learned(make, "method.top_k=2")
    method, pool = run.method, run.data.train
    batch = pool.batch(np.arange(len(pool)))
    assert (method.training_set(batch.rows) == pool.tasks[:, None]).any(1).all()
    with torch.inference_mode(), method.objective.adapters.using("selector"):
        top_2 = method.router.head(method.objective.features(batch)).topk(2, 1).indices
    with torch.inference_mode():
        assert torch.equal(method.select(batch), top_2)


def test_answers_are_labels_seen_so_far(make) -> None:
    run = learned(make, tasks=2)
    with torch.inference_mode():
        choices = AnswerSpace(run.benchmark.seen_labels(2))
        answers = choices.mask(run.method.predict(batch_of(run), choices).scores).argmax(1)
    assert set(answers.tolist()) <= set(run.benchmark.seen_labels(2))


def test_switching_adapters_and_back_is_exact(make) -> None:
    run = learned(make, tasks=2)
    adapters, batch = run.method.objective.adapters, batch_of(run)
    with torch.inference_mode():
        adapters.activate(module_name(0))
        first = run.method.objective.features(batch)
        adapters.activate(module_name(1))
        other = run.method.objective.features(batch)
        adapters.activate(module_name(0))
        again = run.method.objective.features(batch)
    assert not torch.equal(first, other)
    assert torch.equal(first, again)


def test_cost_of_a_task_is_constant(make) -> None:
    """Every task takes S E B examples for the selector and half as many for the module, 1.5 S E B in total."""
    run = make("method=dynamic_conpet", "replay.limit=10")
    costs = []
    for index in range(3):
        run.learn(index)
        costs.append(run.method.objective.meter.take_learning())
    for cost in costs[1:]:
        assert cost["forward_examples"] == cost["backward_examples"] == 8 * 2 * (16 + 8)


def test_the_module_stage_forwards_the_new_half_only(make) -> None:
    """With K = 1 training module k runs neither old examples nor the selector nor frozen modules."""
    run = learned(make, tasks=2)
    seen: list[int] = []
    features = run.method.objective.features

    def spy(batch):
        if run.method.objective.adapters.active == (module_name(2), True):
            seen.extend(batch.tasks.tolist())
        return features(batch)

    run.method.objective.features = spy
    run.learn(2)
    assert set(seen) == {2}


def test_skipping_the_old_half_gives_the_full_gradient(make) -> None:
    """Gradients of module k from the skipped computation equal those of the full batch, in fp64."""
    run = learned(make, "method.top_k=1")
    method = run.method
    method.objective.adapters.model.double()
    method.modules = [head.double() for head in method.modules]
    method.objective.adapters.activate(module_name(2), train=True)
    pool = run.data.train
    rows = np.concatenate([pool.rows_of(2)[:4], pool.rows_of(0)[:2], pool.rows_of(1)[:2]])
    features = method.objective.features
    method.objective.features = lambda batch: _double_features(method.objective, batch)
    parameters = method.parameters()
    batch = pool.batch(rows)
    z = torch.full((8, 12), MISSING, dtype=torch.float64)
    for index in range(3):
        keep = (batch.tasks == index).nonzero().squeeze(1)
        frozen = method.objective.adapters.using(module_name(index)) if index < 2 else contextlib.nullcontext()
        with frozen:
            logits = method.modules[index](method.objective.features(batch.select(keep)))
        z = z.index_put((keep[:, None], torch.as_tensor(method.modules[index].labels)), logits)
    full = torch.autograd.grad(F.cross_entropy(z, batch.labels), parameters)
    short = torch.autograd.grad(method.loss(StepContext.of(pool.batch(rows[:4]))) * (4 / 8), parameters)
    method.objective.features = features
    for a, b in zip(full, short, strict=True):
        assert (a - b).abs().max() <= 1e-12 * a.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("teacher_forcing", [True, False])
def test_skipping_examples_without_the_new_module_gives_the_full_gradient(make, teacher_forcing: bool) -> None:
    """With K = 2 an example whose selected modules are all frozen adds a constant to the loss, whatever its label."""
    forcing = f"method.teacher_forcing={str(teacher_forcing).lower()}"
    run = learned(make, "method.top_k=2", "method.selector_ratio=null", forcing)
    method, pool = run.method, run.data.train
    rows = np.arange(len(pool))
    selected, has_newest = method.training_set(rows), method.selects(2, rows)
    assert 0 < has_newest.sum() < len(rows)
    method.objective.adapters.activate(module_name(2), train=True)
    labels = [method.modules[i].labels for i in range(3)]
    batch, z = pool.batch(rows), torch.full((len(rows), 12), MISSING)
    for index in range(3):
        keep = torch.from_numpy((selected == index).any(1).nonzero()[0])
        frozen = method.objective.adapters.using(module_name(index)) if index < 2 else contextlib.nullcontext()
        with frozen:
            logits = method.modules[index](method.objective.features(batch.select(keep)))
        z = z.index_put((keep[:, None], torch.as_tensor(labels[index])), logits)
    full = torch.autograd.grad(F.cross_entropy(z, batch.labels), method.parameters())
    short = torch.autograd.grad(
        method.loss(StepContext.of(pool.batch(rows[has_newest]))) * (has_newest.sum() / len(rows)), method.parameters()
    )
    for a, b in zip(full, short, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_micro_batch_may_have_frozen_modules_only(make) -> None:
    """With K = 2 one batch of 16 and four of 4, the last with old examples only, end in the same weights."""
    weights = []
    for size in ("null", "4"):
        run = learned(make, "method.top_k=2", f"hardware.micro_batch_size={size}", "train.lr=1e-4")
        weights.append(torch.cat([value.detach().flatten() for value in run.method.parameters()]))
    assert torch.allclose(*weights, atol=1e-5)


def _double_features(objective, batch):
    hidden = objective.adapters.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    weights = batch.attention_mask / batch.attention_mask.sum(1, keepdim=True)
    return torch.einsum("bl,bld->bd", weights.double(), hidden)


@pytest.mark.parametrize("start", ["scratch", "previous", "selector"])
def test_warm_start(make, start: str, monkeypatch) -> None:
    """A new module's adapter starts from the source that method.warm_start names."""
    run = learned(make, f"method.warm_start={start}", tasks=1)
    seen = {}

    def spy(trainer, index):
        seen.update(
            {k: v.detach().clone() for k, v in run.method.objective.adapters.tensors(module_name(index)).items()}
        )

    monkeypatch.setattr(run.method, "fit", spy)
    run.trainer.begin_task(1)
    run.method.learn(run.benchmark.tasks[1], 1, run.trainer)
    source = {"previous": module_name(0), "selector": "selector"}.get(start)
    if source:
        assert all(
            torch.equal(seen[key], value) for key, value in run.method.objective.adapters.tensors(source).items()
        )
    else:
        assert all((value == 0).all() for key, value in seen.items() if "lora_B" in key)


def test_limitless_learns_from_everything(make) -> None:
    """replay=all: the selector stage sees every example of every task so far."""
    run = make("method=dynamic_conpet", "replay=all")
    run.learn(0)
    run.learn(1)
    run.method.objective.meter.take_learning()
    run.learn(2)
    cost = run.method.objective.meter.take_learning()
    assert cost["forward_examples"] == 2 * (72 + 24)


def test_prototypes_route_to_the_nearest_class_mean(make) -> None:
    """Tasks are ranked by the maximum over their classes of cos(h, class mean), h of the bare backbone, untrained."""
    run = learned(make, "method.selector=prototypes", "replay=none")
    method, pool = run.method, run.data.train
    with torch.no_grad(), method.objective.adapters.off():
        h = method.objective.features(pool.batch(np.arange(len(pool))))
        tested = method.objective.features(run.data.test.batch(np.arange(len(run.data.test))))
    scores = torch.full((len(tested), 3), -2.0)
    for task in range(3):
        for label in run.benchmark.task_labels(task):
            mean = h[torch.from_numpy((pool.tasks == task) & (pool.labels == label))].mean(0)
            scores[:, task] = torch.maximum(scores[:, task], F.cosine_similarity(tested, mean[None]))
    ranking = method.ranking(run.data.test, np.arange(len(run.data.test)))
    assert np.array_equal(ranking[:, 0], scores.argmax(1).numpy())
    assert method.trainable_parameters() == sum(p.numel() for p in method.parameters())
    assert method.stored_parameters() == method.trainable_parameters() * 3 + 12 * h.shape[1]


def test_the_selector_has_epochs_and_a_rate_of_its_own(make) -> None:
    """They apply to its stage only; afterwards the trainer has those of the run again."""
    run = make("method=dynamic_conpet", "method.selector_epochs=5", "method.selector_lr=0.5")
    fits: list[tuple[str, int, float]] = []
    run.trainer.progress.fit = lambda stage, epochs, steps: fits.append((stage, epochs, run.trainer.settings.lr))
    run.learn(0)
    run.learn(1)
    assert fits == [("", 2, 1e-3), ("selector", 5, 0.5), ("", 2, 1e-3)]
