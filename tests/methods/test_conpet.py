"""Static ConPET and the baselines without replay against numbers computed by hand."""

import numpy as np
import pytest
import torch

from clpet.methods.base import AnswerSpace
from clpet.methods.components.contrastive import Bank, contrastive, relation_distillation
from clpet.methods.lwf import distillation
from clpet.replay.exemplar import FixedReplay
from clpet.training.step import StepContext


def test_contrastive_loss() -> None:
    """The terms are 0.0183891, 8.8545115, 4.0130441; label A has the first and the third."""
    z, bank = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    labels = torch.tensor([0, 1, 0])
    loss = contrastive(z.double(), torch.tensor([0]), bank.double(), labels, 0.1, 1e-4)
    assert loss.item() == pytest.approx(2.0157166, abs=1e-6)
    only_b = contrastive(z.double(), torch.tensor([1]), bank.double(), labels, 0.1, 1e-4)
    assert only_b.item() == pytest.approx(8.8545115, abs=1e-6)


def test_relation_distillation() -> None:
    """Target (0.949258, 0.050742), KL 0.0277180."""
    previous = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    z = torch.tensor([[0.8, 0.6]], dtype=torch.float64)
    kl = relation_distillation(z, torch.tensor([0]), previous, torch.eye(2, dtype=torch.float64), 10)
    assert kl.item() == pytest.approx(0.0277180, abs=1e-6)


def test_lwf_distillation() -> None:
    """1.0443203 per example over the old columns only, summed over the batch."""
    teacher, student = torch.tensor([[1.0, 0.0, 5.0]]), torch.tensor([[0.0, 1.0, 9.0]])
    assert distillation(teacher[:, :2], student[:, :2]).item() == pytest.approx(1.0443203, abs=1e-6)
    twice = distillation(teacher[:, :2].repeat(2, 1), student[:, :2].repeat(2, 1))
    assert twice.item() == pytest.approx(2 * 1.0443203, abs=1e-6)


def test_lwf_matches_columns_by_label(make) -> None:
    """The order of the head's rows does not change the loss."""
    losses = []
    for order in (range(12), reversed(range(12))):
        run = make("method=lwf")
        method = run.method
        method.objective.head.grow(list(order))
        method.grow_head = lambda index: None
        method.fit = lambda trainer, index: None
        method.learn(run.benchmark.tasks[1], 1, run.trainer)
        table = method.teacher.values
        method.teacher.values = torch.linspace(-1, 1, table.numel()).reshape(table.shape)
        batch = run.data.train.batch(run.data.train.rows_of(1)[:8])
        losses.append(method.loss(StepContext.of(batch)).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_ewc_penalty(make) -> None:
    """F = 2 and a difference of 3 give 9 lambda; the merged quadratic equals the sum of two tasks' penalties."""
    run = make("method=ewc", "method.strength=1.5")
    method = run.method
    method.grow_head(0)
    run.trainer.begin_task(0)
    name = "weight"
    theta = method.named_parameters()[name].detach().double()
    f1, f2 = torch.full_like(theta, 2.0), torch.rand_like(theta)
    first, second = theta - 3, theta + torch.rand_like(theta)
    method.quadratic = {name: (f1, f1 * first, f1 * first.square())}
    method.prepare(0)
    assert method.penalty().item() == pytest.approx(9.0 * 1.5 * theta.numel(), rel=1e-5)
    method.quadratic = {name: (f1 + f2, f1 * first + f2 * second, f1 * first.square() + f2 * second.square())}
    method.prepare(0)
    by_hand = 0.5 * 1.5 * ((f1 * (theta - first).square()).sum() + (f2 * (theta - second).square()).sum())
    assert method.penalty().item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_ewc_leaves_new_rows_free(make) -> None:
    """Only head rows that existed at task j are penalised."""
    run = make("method=ewc", "method.strength=100", "train.epochs=1")
    run.learn(0)
    run.method.prepare(1)
    before = run.method.penalty().item()
    with torch.no_grad():
        run.method.objective.head.weight[4:] += 5
    assert run.method.penalty().item() == pytest.approx(before, abs=1e-6)
    with torch.no_grad():
        run.method.objective.head.weight[:4] += 5
    assert run.method.penalty().item() > before + 1e-3


def test_fisher_weights_every_label_by_its_probability(make) -> None:
    """The formula on one batch of one example: sum_c p_c (grad of -log p_c)^2."""
    small = ["train.global_batch_size=1", "method.fisher_batches=1", "train.epochs=1"]
    run = make("method=ewc", "method.fisher=labels", "benchmark.softmax=seen", *small)
    run.method.grow_head(0)
    fisher = run.method.information(0)["bias"]
    rows = run.data.train.shuffled(run.data.train.rows_of(0), 1, run.method.replay.rng(0, "fisher"))[0]
    with torch.no_grad():
        p = run.method.logits(run.data.train.batch(rows)).softmax(1)[0].double()
    expected = [(p * (p[i] - (torch.arange(4) == i).double()).square()).sum().item() for i in range(4)]
    assert fisher.tolist() == pytest.approx(expected, rel=1e-4)


def test_ewc_without_strength_is_sequential(make) -> None:
    weights = []
    for method in ("sequential", "ewc"):
        run = make(f"method={method}", *(["method.strength=0"] if method == "ewc" else []))
        for index in range(2):
            run.learn(index)
        weights.append(run.method.objective.head.weight.detach())
    assert torch.equal(*weights)


def test_alignment_of_an_unchanged_model_is_the_identity(make) -> None:
    """With A = I and unchanged features the error is 0, and A does not change."""
    run = make("method=ea_emr")
    u = torch.randn(40, run.method.objective.dim)
    run.method.fit_alignment(u, u.clone(), 0)
    assert torch.equal(run.method.align.weight, torch.eye(run.method.objective.dim))


@pytest.mark.parametrize("replay", ["dynamic", "fixed"])
def test_alignment_is_the_identity_after_the_first_task(make, replay: str) -> None:
    """Targets of new classes equal the inputs."""
    run = make("method=ea_emr", f"replay={replay}")
    run.learn(0)
    assert torch.equal(run.method.align.weight, torch.eye(run.method.objective.dim))
    run.learn(1)
    assert not torch.equal(run.method.align.weight, torch.eye(run.method.objective.dim))


def test_alignment_changes_predictions_and_not_in_fine_tuning(make) -> None:
    run = make("method=ea_emr", "replay=dynamic", "method.align_lr=1e-2")
    method = run.method
    for index in range(2):
        run.learn(index)
    before = method.align.weight.detach().clone()
    run.trainer.begin_task(2)
    method.learn(run.benchmark.tasks[2], 2, run.trainer)
    assert torch.equal(method.align.weight, before)
    method.after_task(run.benchmark.tasks[2], 2)
    batch = run.data.test.batch(np.arange(24))
    with torch.inference_mode():
        aligned = method.predict(batch, AnswerSpace(range(12))).scores
        torch.nn.init.eye_(method.align.weight)
        torch.nn.init.zeros_(method.align.bias)
        plain = method.predict(batch, AnswerSpace(range(12))).scores
    assert not torch.allclose(aligned, plain, atol=1e-3)


@pytest.mark.parametrize("replay", ["dynamic", "fixed"])
def test_bank_has_no_zero_vector_and_exact_means(make, replay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry has norm 1, and incremental class means equal a full recomputation."""
    run = make("method=crl", f"replay={replay}")
    checked = []

    def check(self, context: StepContext) -> None:
        for rows, z in self.new_entries:
            self.bank.update(rows, z)
        self.new_entries = []
        bank = self.bank
        assert torch.allclose(bank.z.norm(dim=1), torch.ones(len(bank.z)), atol=1e-5)
        full = torch.zeros_like(bank.sums).index_add_(0, bank.labels, bank.z)
        assert (bank.sums - full).abs().max() <= 1e-5
        checked.append(1)

    monkeypatch.setattr(type(run.method), "after_step", check)
    for index in range(2):
        run.learn(index)
    assert len(checked) > 4


def test_bank_sample_holds_every_label_of_the_batch() -> None:
    labels = np.array([0] * 500 + [1])
    bank = Bank(torch.ones(501, 2), labels, np.arange(501), 501, 2)
    entries = bank.sample(np.array([1, 0]), 40, np.random.default_rng(0))
    assert set(labels[entries].tolist()) == {0, 1}


def test_micro_batches_compare_with_the_same_bank_entries(make) -> None:
    """With a sample of the bank, hardware.micro_batch_size changes no result."""
    adapters = []
    for size in ("null", "4"):
        more = ["replay.limit=10", "method.sample=12", "method.min_per_class=1", f"hardware.micro_batch_size={size}"]
        run = make("method=crl", "replay=dynamic", "train.lr=1e-4", *more)
        for index in range(2):
            run.learn(index)
        adapters.append(run.method.objective.adapters.state()["default"])
    assert all(torch.allclose(adapters[0][name], adapters[1][name], atol=1e-5) for name in adapters[0])


def test_a_row_twice_in_a_batch_is_counted_once() -> None:
    bank = Bank(torch.eye(2), np.array([0, 1]), np.array([0, 1]), 2, 2)
    bank.update(np.array([0, 0]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert bank.sums.tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_starred_crl_draws_as_published(make) -> None:
    """Stage 2 has L E batches, half old and half new, with at least min(10, n_c) examples of every class."""
    run = make("method=crl", "replay=dynamic", "replay.limit=30", "method.min_per_class=3")
    for index in range(2):
        run.learn(index)
    run.method.old = list(run.method.labels)
    plan = run.method.replay_plan(2, 2)
    pool = run.data.train
    batches = [batch for epoch in range(2) for batch in plan.epoch(epoch)]
    assert len(batches) == 30 * 2
    assert all(((pool.tasks[batch] == 2).sum(), len(batch)) == (8, 16) for batch in batches)
    drawn = np.concatenate(batches)
    assert all((pool.labels[drawn] == label).sum() >= 3 for label in range(12))
    run.trainer.settings.epochs = 2
    assert set(run.trainer.rows(plan)) == set(drawn)


def test_crl_answers_the_nearest_class_mean(make) -> None:
    run = make("method=crl", "replay=fixed")
    run.learn(0)
    method, batch = run.method, run.data.test.batch(np.arange(8))
    with torch.inference_mode():
        h = method.objective.features(batch)
        answers = AnswerSpace(range(4)).mask(method.predict(batch, AnswerSpace(range(4))).scores).argmax(1)
    assert method.state_dict()["crl"]["prototypes"].shape == (4, method.objective.dim)  # none of labels to come
    nearest = torch.cdist(h, method.prototypes[:4]).argmin(1)
    assert torch.equal(answers, nearest)


def test_future_labels_change_nothing_at_test_when_permuted(make) -> None:
    """With all labels in the head from the start, labels of later tasks are never predicted."""
    run = make("method=emr", "replay=dynamic", "method.future_labels=true")
    for index in range(2):
        run.learn(index)
    head = run.method.objective.head
    assert len(head.labels) == 12
    choices, batch = AnswerSpace(run.benchmark.seen_labels(2)), run.data.test.batch(np.arange(24))
    with torch.inference_mode():
        before = choices.mask(run.method.predict(batch, choices).scores).argmax(1)
        head.weight[8:] = head.weight[8:].flip(0).clone()
        head.bias[8:] = head.bias[8:].flip(0).clone()
        after = choices.mask(run.method.predict(batch, choices).scores).argmax(1)
    assert torch.equal(before, after)


def test_loss_at_a_task_does_not_depend_on_how_many_will_come(make, words) -> None:
    """The first two tasks are learned alike in benchmarks of two and of three tasks."""
    weights = []
    for tasks in ("benchmark.tasks=[fruit,metal]", "benchmark.tasks=[fruit,metal,river]"):
        run = make("method=emr", "replay=dynamic", tasks)
        for index in range(2):
            run.learn(index)
        weights.append(run.method.objective.head.weight.detach())
    assert torch.equal(*weights)


def test_validation_of_old_tasks_cannot_change_while_a_module_learns(make) -> None:
    """With K = 1 an old example is scored by a frozen module, or is wrong."""
    run = make("method=dynamic_conpet")
    for index in range(2):
        run.learn(index)
    method, pool = run.method, run.data.validation
    batch = pool.batch(pool.rows_of(0, 1))
    seen: list[torch.Tensor] = []

    def right() -> float:
        with torch.inference_mode():
            choices = AnswerSpace(range(12))
            scores = choices.mask(method.predict(batch, choices).scores)
            seen.append(scores.argmax(1) == batch.labels)
        return 0.0

    original = method.fit

    def fit(trainer, index: int) -> None:
        right()
        original(trainer, index)
        right()

    method.fit = fit
    run.learn(2)
    assert torch.equal(seen[0], seen[1])


def test_best_epoch_counts_validation_memories(make) -> None:
    """EMR validates on the new task and a fifth of the memory; replay=dynamic on half new, half old samples."""
    run = make("method=emr", "replay=fixed", "replay.per_class=5")
    run.learn(0)
    assert isinstance(run.method.replay, FixedReplay)
    (pool, rows), (train, memory_rows) = run.method.replay.validation(1)
    assert set(pool.tasks[rows]) == {1}
    assert set(train.tasks[memory_rows]) == {0}
    star = make("method=emr", "replay=dynamic", "replay.limit=10")
    star.learn(0)
    ((pool, rows),) = star.method.replay.validation(1)
    assert len(rows) == 2 * 32
    assert (pool.tasks[rows] == 1).sum() == 32
