"""LoRA branches per task, added or routed, against numbers computed by hand, and properties of all baselines."""

import numpy as np
import pytest
import torch
from torch import nn

from clpet.methods import mocl, o_lora, sapt
from clpet.replay.exemplar_selection import stratified_sample
from clpet.training.step import StepContext
from tests.conftest import double, scores

INCREMENTS = ["inc_lora", "o_lora", "sapt", "mocl", "inf_lora", "gain_lora"]
ROUTED = ["sapt", "mocl", "gain_lora", "l2p"]


def test_orthogonality_is_a_sum_of_absolute_values() -> None:
    """|A_prev A_new^T| = [[.5, 2], [.5, 1]] sums to 4; the norm of A_new is not squared."""
    old, new = double([[1, 0, 0, 2], [0, 1, 1, 0]]), double([[0.5, 0.5, 0, 0], [0, 0, 1, -1]])
    assert o_lora.overlap(old, new).item() == 4.0
    assert new.norm().item() == pytest.approx(1.5811388301, abs=1e-10)


def test_o_lora_adds_both_terms_of_its_formula(make) -> None:
    run = make("method=o_lora", "method.orthogonality=[0,0.5,5]", "method.decay=0.1")
    run.learn(0)
    run.learn(1)
    method, layers = run.method, run.method.stack.layers.values()
    penalty = method.step_loss(None).item()
    overlap = sum((layer.frozen_A @ layer.A.T).abs().sum().item() for layer in layers)
    norms = sum(layer.A.square().sum().sqrt().item() + layer.B.square().sum().sqrt().item() for layer in layers)
    assert overlap > 0
    assert penalty == pytest.approx(0.5 * overlap + 0.1 * norms, rel=1e-4)


def test_o_lora_without_its_terms_is_inc_lora(make) -> None:
    weights = []
    for method in (["inc_lora"], ["o_lora", "method.orthogonality=0"]):
        run = make(f"method={method[0]}", *method[1:])
        run.learn(0)
        run.learn(1)
        weights.append(torch.cat([tensor.detach().flatten() for tensor in run.method.parameters()]))
    assert torch.equal(*weights)


def test_orthogonality_keeps_branches_apart(make) -> None:
    overlaps = []
    for strength in (0, 5):
        run = make("method=o_lora", f"method.orthogonality={strength}", "train.lr=1e-2")
        run.learn(0)
        run.learn(1)
        overlaps.append(run.method.overlap().item())
    assert overlaps[1] < 0.5 * overlaps[0]


def test_sapt_weights_and_divergence() -> None:
    """The newest branch is last: scores [.5, .5, .75], and the KL of the stored [.7, .3, 0]."""
    scores = sapt.scores(double([[1, 2, 0, -1]]), double([[1, 0, 0, 0], [0, 1, 0, 1], [0.5, 0.5, 0, 0]]))
    assert scores[0].tolist() == [0.5, 0.5, 0.75]
    assert scores.softmax(1)[0].tolist() == pytest.approx([0.3045043424, 0.3045043424, 0.3909913152], abs=1e-10)
    assert sapt.divergence(double([0.7, 0.3]), scores).item() == pytest.approx(0.578205629, abs=1e-9)


def test_sapt_keeps_inputs_and_mean_weights(make) -> None:
    """Two percent of a task's inputs, at least one, are stored, and the mean weights over the branches so far."""
    run = make("method=sapt", "method.share=0.2")
    for index in range(3):
        run.learn(index)
    method = run.method
    assert [len(rows) for rows in method.memory.values()] == [4, 4, 4]
    assert all(set(run.data.train.tasks[rows]) == {task} for task, rows in method.memory.items())
    assert [len(mean) for mean in method.means] == [1, 2, 3]
    assert all(mean.sum().item() == pytest.approx(1, abs=1e-6) for mean in method.means)
    extra = method.step_loss(None)
    by_hand = 0.0
    for task in range(2):
        weights = method.route(run.data.train.batch(method.memory[task])).double()
        target = torch.nn.functional.pad(method.means[task], (0, 2 - task)).double()
        by_hand += torch.xlogy(target, target / weights).sum(1).mean().item()
    assert extra.item() == pytest.approx(0.5 * by_hand, rel=1e-3, abs=1e-6)


def test_a_stratified_sample_has_every_label() -> None:
    """Sizes of the SuperNI tasks: a sample of 20 has all of 14 labels, but not 1000 different targets."""
    rng = np.random.default_rng(0)

    def sample(count: int, labels: int) -> np.ndarray:
        return stratified_sample(np.arange(count) % labels, np.arange(count), 0.02, rng)

    assert len(sample(1000, 14)) == 20
    assert set(sample(1000, 14) % 14) == set(range(14))
    assert set(sample(250, 3) % 3) == {0, 1, 2}
    sizes = {1000: 20, 250: 5, 160: 3, 126: 2, 338: 6, 142: 2, 975: 19, 10: 1}
    assert {count: len(sample(count, count)) for count in sizes} == sizes
    assert len(stratified_sample(np.zeros(9), np.arange(9), 0.0, rng)) == 0


def test_mocl_weights_and_matching(make) -> None:
    """Weights are softmax(8 c) or c; if the task is given, later modules are excluded."""
    cosines = double([[0.9, 0.5]])
    method = mocl.MoCL()
    assert method.branch_weights(cosines)[0].tolist() == pytest.approx([0.9608342772, 0.0391657228], abs=1e-10)
    assert method.branch_weights(cosines, torch.tensor([0]))[0].tolist() == [1.0, 0.0]
    direct = mocl.MoCL(compose=mocl.Compose.direct)
    assert direct.branch_weights(cosines)[0].tolist() == [0.9, 0.5]
    assert direct.branch_weights(cosines, torch.tensor([0]))[0].tolist() == [0.9, 0.0]
    run = make("method=mocl")
    run.learn(0)
    run.learn(1)
    batch = run.data.train.batch(run.data.train.rows_of(1)[:4])
    run.method.cosines = lambda queries: cosines.float().expand(len(queries), 2)
    matching = run.method.loss(StepContext.of(batch)) - run.method.routed_loss(
        batch, run.method.branch_weights(cosines.float().expand(4, 2))
    )
    assert matching.item() == pytest.approx(0.5, abs=1e-6)


def test_mocl_query_of_a_train_row_is_that_of_the_bare_backbone(make) -> None:
    """Queries computed once before the task equal those computed after it, because branches do not change them."""
    run = make("method=mocl", "train.lr=1e-2")
    for index in range(2):
        run.learn(index)
    rows = run.data.train.rows_of(1)[:5]
    again = run.method.query(run.data.train.batch(rows))
    assert torch.allclose(run.method.queries[run.method.query_row[rows]], again, atol=1e-5)


@pytest.mark.parametrize("name", ROUTED)
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(name: str, make) -> None:
    """Nor does it depend on padding: texts of different lengths, each alone and all in one batch."""
    run = make(f"method={name}", "train.lr=1e-2")
    for index in range(2):
        run.learn(index)
    rows = np.arange(12)
    assert len(set(run.data.test.lengths[rows])) > 1
    alone = torch.cat([scores(run, rows[i : i + 1]) for i in range(12)])
    assert torch.allclose(scores(run, rows), alone, atol=1e-4)


@pytest.mark.parametrize("name", ["inc_lora", "o_lora", "sapt", "ewc", "lwf", "replay"])
def test_one_task_is_sequential_fine_tuning(name: str, make) -> None:
    """From the same start the first task ends in the same bits: these methods act from task 2 on."""
    seq, run = make("method=sequential"), make(f"method={name}")
    if name in INCREMENTS:
        stack, add = run.method.stack, run.method.stack.add
        start = {key: value.detach().clone() for key, value in seq.method.objective.adapters.tensors("default").items()}

        def add_the_same(seed: int) -> None:
            add(seed)
            for key, layer in stack.layers.items():
                with torch.no_grad():
                    layer.A.copy_(start[f"base_model.model.{key}.lora_A.weight"])

        stack.add = add_the_same
    seq.learn(0)
    run.learn(0)
    assert torch.equal(run.method.objective.head.weight, seq.method.objective.head.weight)
    assert torch.equal(scores(run, np.arange(24)), scores(seq, np.arange(24)))


@pytest.mark.parametrize("name", [*INCREMENTS, "l2p", "progressive_prompts", "osf", "ewc", "lwf"])
def test_micro_batches_add_up_to_the_same_gradient(name: str, make) -> None:
    """One batch of 16 and four of 4 give equal gradients with every penalty, at random values of B and other zeros."""
    more = {"o_lora": ["method.decay=0.1"], "ewc": ["method.merge=average", "method.fisher=batch", "method.strength=100"],
            "lwf": ["method.reduction=mean", "method.temperature=2"]}.get(name, [])  # fmt: skip
    grads = []
    for size in ("null", "4"):
        run = make(f"method={name}", f"hardware.micro_batch_size={size}", *more)
        run.learn(0)
        if name in INCREMENTS:
            add, layers = run.method.stack.add, run.method.stack.layers

            def add_filled(seed: int, add=add, layers=layers) -> None:
                add(seed)
                for layer in layers.values():
                    nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(0))

            run.method.stack.add = add_filled
        first: list[list[torch.Tensor | None]] = []

        def record(context: StepContext, run=run, first=first, adjust=run.method.adjust_gradients) -> None:
            adjust(context)
            first.append(
                [value.grad if value.grad is None else value.grad.clone() for value in run.method.parameters()]
            )

        run.method.adjust_gradients = record
        run.trainer.begin_task(1)
        run.method.learn(run.benchmark.tasks[1], 1, run.trainer)
        grads.append(first[0])
    assert all(grad is not None for grad in grads[0])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("name", [*INCREMENTS, "l2p", "progressive_prompts", "osf"])
def test_a_state_gives_back_the_predictions(name: str, make) -> None:
    """A restored state gives the same predictions bit for bit after two tasks."""
    run, twin = make(f"method={name}"), make(f"method={name}")
    for index in range(2):
        run.learn(index)
    twin.method.load_state_dict(run.method.state_dict())
    assert torch.equal(scores(twin, np.arange(24)), scores(run, np.arange(24)))
    assert twin.method.trainable_parameters() == run.method.trainable_parameters()


@pytest.mark.parametrize("name", INCREMENTS)
def test_earlier_branches_keep_their_bits(name: str, make) -> None:
    run = make(f"method={name}", "train.lr=1e-2")
    run.learn(0)
    first = run.method.stack.state()
    run.learn(1)
    for key, layer in run.method.stack.layers.items():
        assert torch.equal(layer.frozen_A, first[key]["A"])
        assert torch.equal(layer.frozen_B, first[key]["B"])
        assert first[key]["B"].abs().max() > 0
