"""Numbers that functions of the authors' ConPET code returned (Raincleared-Song/ConPET), in fp64 on a CPU."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from clpet.config.schema import Training
from clpet.data.batches import EncodedDataset
from clpet.data.template import tokens_to_keep
from clpet.methods.base import AnswerSpace
from clpet.methods.components.contrastive import Bank, contrastive, relation_distillation
from clpet.methods.crl import CRL
from clpet.methods.dynamic_conpet import DynamicConPET
from clpet.methods.ea_emr import EAEMR
from clpet.methods.ewc import EWC, Fisher, Merge
from clpet.methods.lwf import distillation
from clpet.objectives.classification import Classification
from clpet.replay.batch_plan import split_batch, steps_and_val_batches
from clpet.replay.exemplar_selection import kmeans_nearest, split_train_val
from clpet.runtime.distributed import rows_of_rank
from clpet.training.optimizers import Optimizer
from clpet.training.step import StepContext
from tests.conftest import double

BANK = double([[1, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8], [-1, 0], [0.6, -0.8]])
BANK_LABELS = [0, 0, 1, 1, 2, 2]  # A A B B C C
Z = double([[0.6, 0.8], [0.8, -0.6], [0, 1]])  # of a batch with the labels A, B, C


def bank() -> Bank:
    return Bank(BANK, np.array(BANK_LABELS), np.arange(6), 9, 3)


def test_contrastive_loss() -> None:
    """`Moment.loss`: per example and in the mean."""
    single = [
        contrastive(Z[i : i + 1], torch.tensor([i]), BANK, torch.tensor(BANK_LABELS), 0.1, 1e-4).item()
        for i in range(3)
    ]
    assert single == pytest.approx([2.0059001570, 9.3948045065, 9.1666355369], abs=1e-9)
    batch = contrastive(Z, torch.arange(3), BANK, torch.tensor(BANK_LABELS), 0.1, 1e-4)
    assert batch.item() == pytest.approx(6.8557800668, abs=1e-9)


MEANS = [[0.9486833, 0.3162278], [-0.3162278, 0.9486833], [-0.4472136, -0.8944272]]


def test_class_means() -> None:
    """`get_mem_proto`."""
    assert torch.allclose(bank().means(), double(MEANS), atol=1e-7)


PROTOTYPES = double([[1, 2], [2, -1], [0, 0]])


def test_distillation_of_old_rows() -> None:
    """`kl_div_loss`: row A and row B."""
    kl = relation_distillation(Z[:2], torch.arange(2), PROTOTYPES[:2], bank().means()[:2], 10)
    assert kl.tolist() == pytest.approx([0.0762738650, 13.9128915664], abs=1e-9)


def crl(*old: int) -> CRL:
    """CRL in stage 2 whose features at rows 6, 7, 8 are Z; `old` are the classes of earlier tasks."""
    method = CRL()
    method.objective = SimpleNamespace(features=lambda batch: Z[torch.from_numpy(batch.rows) - 6])
    method.projection = nn.Identity()
    method.data = SimpleNamespace(train=SimpleNamespace(labels=np.array([*BANK_LABELS, 0, 1, 2])))
    method.bank, method.prototypes, method.computed = bank(), PROTOTYPES, []
    method.old, method.old_labels, method.distil, method.sampled = list(old), torch.tensor(old), True, False
    return method


def step_loss(method: CRL, micro_batches: list[list[int]]) -> float:
    """The loss of the batch of rows 6, 7, 8 in micro-batches, weighted as in the trainer."""
    rows = np.concatenate([np.array(chunk) for chunk in micro_batches])
    method.before_step(SimpleNamespace(rows=rows))
    labels = torch.from_numpy(method.data.train.labels)
    losses = [
        method.loss(SimpleNamespace(counts=True, batch=SimpleNamespace(rows=np.array(chunk), labels=labels[chunk])))
        * len(chunk)
        / 3
        for chunk in micro_batches
    ]
    return sum(losses).item()


def test_a_mixed_step_is_averaged_over_its_old_rows() -> None:
    """`train_mem_model`: L_KD is a mean over the OLD rows, for all divisions into micro-batches and ranks."""
    rows = np.array([6, 7, 8])
    ranks = [rows_of_rank(rows, index, 2).tolist() for index in range(2)]
    for micro_batches in ([[6, 7, 8]], [[6], [7, 8]], [[8], [6], [7]], ranks):
        assert step_loss(crl(0, 1), micro_batches) == pytest.approx(13.8503627825, abs=1e-6)
    assert step_loss(crl(0, 1), [[6, 7, 8]]) - 6.8557800668 == pytest.approx(6.9945827157, abs=1e-6)


def test_a_step_without_old_rows_distils_nothing() -> None:
    assert step_loss(crl(3), [[6, 7, 8]]) == pytest.approx(6.8557800668, abs=1e-9)


@pytest.mark.parametrize(("replay", "sampled"), [("fixed", [True, False]), ("dynamic", [True, True])])
def test_stage_one_contrasts_with_a_sample_of_the_bank(replay: str, sampled: list[bool], make) -> None:
    """`train_simple_model` samples 500 entries with a fixed memory, too; its stage 2 uses all entries.

    The projection has biases.
    """
    run = make("method=crl", f"replay={replay}", "method.sample=9", "train.epochs=1", "method.min_per_class=1")
    run.learn(0)
    is_sample: dict[str, set[bool]] = {}
    choose_entries = run.method.before_step

    def record(context: StepContext) -> None:
        choose_entries(context)
        entries, size = run.method.entries, len(run.method.bank.z)
        chosen = range(size)[entries] if isinstance(entries, slice) else entries
        is_sample.setdefault("replay" if run.method.distil else "contrast", set()).add(len(chosen) < size)

    run.method.before_step = record
    run.learn(1)
    assert [is_sample["contrast"], is_sample["replay"]] == [{value} for value in sampled]
    width = run.method.objective.dim
    assert [tuple(value.shape) for value in run.method.projection.parameters()] == [(width, width), (width,), (64, width), (64,)]  # fmt: skip


def test_squared_distances() -> None:
    """`osdist`."""
    method = CRL()
    method.objective = SimpleNamespace(features=lambda batch: double([[1, 2]]))
    method.prototypes, method.labels = double([[0, 0], [1, 1], [3, 2]]), [0, 1, 2]
    scores = method.predict(SimpleNamespace(), AnswerSpace(range(3))).scores
    assert (-scores).flatten().tolist() == pytest.approx([5, 1, 4], abs=1e-6)


def test_fisher_information() -> None:
    """`get_model_mean_fisher`: a linear model and three batches, of two, two and one example."""
    weight = nn.Parameter(double([[1, 0], [0, 1], [0.5, -0.5]]))
    bias = nn.Parameter(double([0, 0.1, -0.1]))
    batches = [double([[1, 2], [0, 1]]), double([[2, -1], [1, 1]]), double([[-1, 0]])]
    method = EWC(fisher=Fisher.labels, fisher_batches=None)
    method.named_parameters = lambda: {"weight": weight, "bias": bias}
    method.logits = lambda x: x @ weight.T + bias
    pool = SimpleNamespace(rows_of=lambda index: None, shuffled=lambda *_: batches, batch=lambda x, device: x)
    method.data = SimpleNamespace(train=pool)
    method.replay = SimpleNamespace(batch_size=2, rng=lambda *_: None)
    method.objective = SimpleNamespace(
        device="cpu",
        work=lambda batch: None,
        flops=SimpleNamespace(network=SimpleNamespace(backward=lambda work: 0)),
        meter=SimpleNamespace(count_backward=lambda batch, flops, times: None),
    )
    fisher = method.information(0)
    assert fisher["weight"].flatten().tolist() == pytest.approx(
        [0.25255681, 0.13609458, 0.24251952, 0.17595474, 0.20989133, 0.06151066], abs=1e-8
    )
    assert fisher["bias"].tolist() == pytest.approx([0.19165150, 0.21573643, 0.15233169], abs=1e-8)


def test_ewc_penalty() -> None:
    """`calculate_ewc_loss`, lambda 2: tasks (mean, F) = ((1, 2), (2, .5)) and ((0, -1), (1, 3)) at (.5, .5)."""
    tasks = [(double([1, 2]), double([2, 0.5])), (double([0, -1]), double([1, 3]))]
    theta = nn.Parameter(double([0.5, 0.5]))
    method = EWC(strength=2, merge=Merge.tasks)
    method.objective = SimpleNamespace(device="cpu")
    method.grow_head = lambda index: None
    method.named_parameters = lambda: {"theta": theta}
    method.quadratic = {"theta": tuple(sum(f * mean**power for mean, f in tasks) for power in range(3))}
    method.prepare(2)
    assert method.penalty().item() == pytest.approx(8.625, abs=1e-6)


def test_lwf() -> None:
    """`calculate_lwf_loss`, lambda .5: old columns {0, 1}, T = 1, summed over the batch."""
    teacher, student = double([[1, 0], [-1, 2]]), double([[0, 1], [0.5, 0.5]])
    assert 0.5 * distillation(teacher, student).item() == pytest.approx(0.8687337234, abs=1e-9)


# Dynamic ConPET: three tasks of two labels, task 3 in training; examples a, b, c, d
SELECTOR = torch.tensor([[3.0, 2, 1], [0, 2, 1], [1, 0, 2], [2, 1, 0]])
MODULES = torch.tensor(
    [
        [[2.0, 0], [1, 1], [0, 1], [1, -1]],
        [[0, 1], [1, 3], [-1, 0], [0.5, 0.5]],
        [[1, 0], [0, 0], [2, 1], [1, 3]],
    ]
)
SETS = {1: ([[0], [1], [2], [2]], [[0], [1], [2], [0]]),
        2: ([[0, 1], [1, 2], [2, 0], [0, 2]], [[0, 1], [1, 2], [2, 0], [0, 1]])}  # fmt: skip
LOSSES = {1: 0.1735114302, 2: 0.3962971824}
GRADIENTS = {
    1: [[0, 0], [0, 0], [-0.0672354, 0.0672354], [0.0298007, -0.0298007]],
    2: [[0, 0], [0.0100791, 0.0100791], [-0.1163883, 0.0491530], [0.0262484, -0.0560491]],
}
OLD = {  # the part of the loss of examples without the newest module in their set: no gradient, not computed by clpet
    1: [math.log(math.exp(2) + 1) - 2, math.log(math.exp(1) + math.exp(3)) - 3],
    2: [math.log(math.exp(2) + 1 + 1 + math.exp(1)) - 2],
}


@pytest.mark.parametrize("k", [1, 2])
def test_module_stage_of_dynamic_conpet(k: int) -> None:
    """`generate_continual_logits` and `select_topk_experts`: sets, loss, gradients and predictions."""
    pool = EncodedDataset([[1]] * 4, [0, 3, 4, 5], [0, 1, 2, 2], 0)
    newest = MODULES[2].clone().requires_grad_()
    method = DynamicConPET(top_k=k)
    method.objective = Classification()
    method.objective.label_weights = None
    method.data = SimpleNamespace(train=pool)
    method.benchmark = SimpleNamespace(labels=range(6), seen_labels=lambda tasks: list(range(2 * tasks)))
    method.modules = [head(2 * index, 2 * index + 1) for index in range(3)]
    method.start = torch.zeros(6, 1)
    method.router = SimpleNamespace(ranking=lambda pool, rows, count: SELECTOR[rows].topk(count, 1).indices.numpy())
    method.cache = SimpleNamespace(get=lambda name, pool, rows: MODULES[int(name[-1])][rows].numpy())
    method.logits = lambda batch: newest[batch.rows]
    training, test = SETS[k]
    rows = np.arange(4)
    assert method.training_set(rows).tolist() == training
    has_newest = method.selects(2, rows)
    loss = method.loss(StepContext.of(pool.batch(rows[has_newest]))) * (has_newest.sum() / 4)
    loss.backward()
    assert loss.item() + sum(OLD[k]) / 4 == pytest.approx(LOSSES[k], abs=1e-7)
    assert torch.allclose(newest.grad, torch.tensor(GRADIENTS[k]), atol=1e-7)
    batch = pool.batch(rows)
    method.module_logits = lambda batch, index: MODULES[index][batch.rows]
    selected = method.select(batch)
    assert selected.tolist() == test
    assert method.route(batch, selected).argmax(1).tolist() == [0, 3, 4, 0]


def head(*labels: int) -> SimpleNamespace:
    """A stand-in for a module's head."""
    return SimpleNamespace(labels=list(labels), columns=lambda queried: queried - labels[0])


def test_alignment() -> None:
    """`update_alignment_model`: Adam 1e-4, 20 epochs of one batch, from the identity."""
    u, e = double([[1, 0], [0, 1], [1, 1], [-1, 0.5]]), double([[0.9, 0.1], [0.2, 1], [1, 1.2], [-1, 0.4]])
    method = EAEMR()
    method.seed, method.align = 0, nn.Linear(2, 2).double()
    nn.init.eye_(method.align.weight)
    nn.init.zeros_(method.align.bias)
    method.fit_alignment(u, e, 0)
    expected = double([[0.9980036, 0.0019948], [0.0019973, 1.0019914]])
    assert torch.allclose(method.align.weight, expected, atol=1e-7)
    assert torch.allclose(method.align.bias, double([0.0019861, 0.0019907]), atol=1e-7)


def test_alignment_is_fitted_on_the_memory_that_is_trained_on(make) -> None:
    """`update_alignment_model` uses the training part of the memory; the number of copies follows its actual size."""
    run = make("method=ea_emr", "replay=fixed", "replay.per_class=5", "replay.limit=20")
    run.learn(0)
    replay = run.method.replay
    assert len(replay.val_memory[0]) == 4  # of each of four classes one of five
    assert set(run.method.rows) == set(replay.memory[0])
    assert len(run.method.embeddings) == len(replay.memory[0]) == 16
    replay.memory[0] = replay.memory[0][:7]  # fewer than ceil(0.8 m) a class
    room, classes = 16 * 16 - 24, len(set(run.data.train.labels[replay.memory_rows()]))  # ceil(0.8 L) B - new
    assert run.method.plan(1).steps == -(-(24 + 7 * math.ceil(room / 7)) // 16)
    replay.count_actual_size = False  # EMR's
    assert run.method.plan(1).steps == -(-(24 + 7 * math.ceil(room / (4 * classes))) // 16)


def test_adamw() -> None:
    """The authors' AdamW: lr .01, weight decay .01, eps 1e-4."""
    parameter = nn.Parameter(double([1, -2, 0.5]))
    optimizer = Optimizer({"parameter": parameter}, Training(weight_decay=0.01, eps=1e-4))
    for gradient in ([1, 0.001, 0], [0.5, -0.001, 0], [-1, 0.002, 1e-5]):
        parameter.grad = double(gradient)
        optimizer.step(0.01)
    assert parameter.tolist() == pytest.approx([0.979275642, -2.012664185, 0.499501162], abs=1e-9)


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [(8, 1, (4, 4)), (8, 3, (6, 2)), (8, 0.5, (2, 6)), (8, -3, (2, 6)), (32, 1, (16, 16)), (9, 1, (4, 5)),
     (16, 1, (8, 8)), (10, 1.5, (6, 4)), (7, -0.75, (4, 3))],
)  # fmt: skip
def test_split_of_a_batch(size: int, ratio: float, expected: tuple[int, int]) -> None:
    """Numbers of (new, old) examples in a batch."""
    assert split_batch(size, ratio) == expected


def test_a_split_is_not_lost_to_rounding() -> None:
    """Deliberately different: the authors' floats make 16 * .6 / 1.6 = 5.999..., which gives (5, 11)."""
    assert split_batch(16, 0.6) == (6, 10)


def test_limit() -> None:
    """Numbers of (training steps, validation batches)."""
    sizes = {limit: steps_and_val_batches(limit) for limit in (2500, 333, 50, 25, 7)}
    assert sizes == {2500: (2000, 500), 333: (266, 66), 50: (40, 10), 25: (20, 5), 7: (5, 1)}


def test_memory_with_duplicates() -> None:
    """Six distinct points five times each, m = 10: six are selected; the sample of 80 % is over the ten centres."""
    rows = np.arange(30)
    points = double([[i % 6 * 10, i % 6] for i in range(30)]).numpy()
    centres = rows[kmeans_nearest(points, 10, 0)]
    assert len(centres) == 10
    assert sorted(centres % 6) == sorted([*range(6), *(centres % 6)][-10:])
    assert len(set(centres)) == 6
    for seed in range(20):
        rng, again = np.random.default_rng(seed), np.random.default_rng(seed)
        train, spare = split_train_val(centres, 0.8, rng)
        left_out = again.permutation(centres)[8:]
        assert set(train) | set(spare) == set(centres)
        assert set(spare) == {row for row in left_out if (centres == row).sum() == (left_out == row).sum()}
        assert not set(train) & set(spare)


def test_kmeans_takes_the_best_of_ten_starts() -> None:
    """n_init = 10, scikit-learn's default when ConPET was written: one start merges two of these groups of three."""
    points = np.array([[5.0 * group + offset] for group in range(6) for offset in (-1, 0, 1)])
    assert kmeans_nearest(points, 6, seed=0) == [3 * group + 1 for group in range(6)]


@pytest.mark.parametrize(
    ("limit", "head", "tail", "length", "first", "last"),
    [(10, 3, 5, 30, 0, 9), (10, 15, 18, 30, 12, 21), (10, 25, 28, 30, 20, 29), (9, 15, 18, 30, 12, 20),
     (20, 12, 15, 40, 4, 23)],
)  # fmt: skip
def test_window(limit: int, head: int, tail: int, length: int, first: int, last: int) -> None:
    """The tokens that remain of a sentence cut around the markers of head and tail."""
    offsets = [(2 * i, 2 * i + 1) for i in range(length)]
    tokens = tokens_to_keep(offsets, [offsets[head], offsets[tail]], limit)
    assert tokens == list(range(first, last + 1))
