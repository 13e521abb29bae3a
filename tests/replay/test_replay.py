"""Replay components compared with the counts and distributions of ConPET."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from clpet.data.batches import Encoded, EncodedDataset
from clpet.errors import ConfigError
from clpet.replay.base import AllReplay, NoReplay
from clpet.replay.batch_plan import copies_for_equal_compute, split_batch, steps_and_val_batches
from clpet.replay.exemplar import FixedReplay, ShareReplay
from clpet.replay.exemplar_selection import herding, kmeans_nearest
from clpet.replay.sampled import DynamicReplay, ReservoirReplay


def pool(sizes: list[int], classes: int = 2) -> EncodedDataset:
    """A pool with `sizes[j]` one-token examples of task j."""
    tasks = np.repeat(np.arange(len(sizes)), sizes)
    labels = [task * classes + i % classes for i, task in enumerate(tasks)]
    return EncodedDataset([[1]] * len(tasks), labels, tasks.tolist(), 0, -1)


def set_up(replay, sizes: list[int], batch: int = 8, learned: int | None = None):
    """Sets up a component whose memory contains the first `learned` tasks."""
    examples = pool(sizes)
    replay.setup(Encoded(examples, examples, examples), 0, batch)
    for index in range(len(sizes) - 1 if learned is None else learned):
        replay.update_memory(index, lambda rows: np.random.default_rng(1).normal(size=(len(rows), 3)))
    return replay


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        (8, 1, (4, 4)),
        (8, 3, (6, 2)),
        (8, 0.5, (2, 6)),
        (8, -3, (2, 6)),
        (32, 1, (16, 16)),
        (9, 1, (4, 5)),
        (8, 0.6, (3, 5)),
        (32, 0.6, (12, 20)),
    ],
)
def test_batch_shares(size: int, ratio: float, expected: tuple[int, int]) -> None:
    """Oracle 5."""
    assert split_batch(size, ratio) == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(2500, (2000, 500)), (1250, (1000, 250)), (500, (400, 100)), (400, (320, 80)), (100, (80, 20))],
)
def test_steps_and_validation_batches(limit: int, expected: tuple[int, int]) -> None:
    """Oracle 6."""
    assert steps_and_val_batches(limit) == expected


def test_steps_do_not_depend_on_task_or_its_size() -> None:
    """Oracle 6: the same S for every k >= 2 and any |D_k|, and constant replay per step."""
    for sizes in ([50, 5, 900], [50, 900, 5, 70]):
        replay = set_up(DynamicReplay(limit=100), sizes)
        plan = replay.plan(len(sizes) - 1)
        batches = plan.epoch(0)
        assert plan.steps == len(batches) == 80
        old = {int((plan.pool.tasks[rows] < len(sizes) - 1).sum()) for rows in batches}
        assert old == {4}


def test_old_draws_are_uniform_over_tasks() -> None:
    """Oracle 7: S * n_old / (k-1) expected per old task; chi-square rejects 'proportional to size' on BBN's sizes."""
    bbn = [4822, 6210, 2738, 5120, 46199, 7373, 5260, 6751, 2264, 2628]
    replay = set_up(DynamicReplay(limit=400), bbn)
    batches = replay.plan(9).epoch(0)
    tasks = Counter(replay.pool.tasks[np.concatenate([rows[4:] for rows in batches])].tolist())
    observed = [tasks[task] for task in range(9)]
    assert sum(observed) == 320 * 4
    assert sum(observed) / 9 == pytest.approx(142.2, abs=0.1)
    assert stats.chisquare(observed).pvalue > 0.001
    share = np.array(bbn[:9]) / sum(bbn[:9])
    assert stats.chisquare(observed, share * sum(observed)).pvalue < 1e-12


def test_new_examples_of_a_batch_are_distinct() -> None:
    """Oracle 8."""
    for rows in set_up(DynamicReplay(limit=50), [20, 6]).plan(1).epoch(0):
        assert len(set(rows[:4].tolist())) == 4


def test_first_task_is_an_ordinary_epoch() -> None:
    """Oracle 8: every example once, ceil(|D_1| / B) steps; FewNERD 3802."""
    replay = set_up(DynamicReplay(limit=50), [35, 10], learned=0)
    plan = replay.plan(0)
    rows = np.concatenate(plan.epoch(0))
    assert plan.steps == len(plan.epoch(0)) == 5
    assert sorted(rows.tolist()) == list(range(35))
    assert -(-30415 // 8) == set_up(DynamicReplay(), [30415], learned=0).plan(0).steps == 3802


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    """Oracle 9."""
    first, second = (set_up(DynamicReplay(limit=50), [40, 40]).plan(1) for _ in range(2))
    for epoch in range(2):
        for a, b in zip(first.epoch(epoch), second.epoch(epoch), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not all(np.array_equal(a, b) for a, b in zip(first.epoch(0), first.epoch(1), strict=True))


def test_stages_of_one_task_draw_differently() -> None:
    replay = set_up(DynamicReplay(limit=50), [40, 40])
    assert not np.array_equal(replay.plan(1, "selector").epoch(0)[0], replay.plan(1, "module").epoch(0)[0])


def test_too_few_new_examples_repeat() -> None:
    rows = set_up(DynamicReplay(limit=10), [20, 2]).plan(1).epoch(0)[0]
    assert (rows[:4] >= 20).all()
    assert len(rows) == 8


def test_none_contains_the_new_task_only() -> None:
    replay = set_up(NoReplay(), [10, 12])
    assert sorted(np.concatenate(replay.plan(1).epoch(0)).tolist()) == list(range(10, 22))
    assert replay.stored() == 0


def test_all_contains_every_task_once() -> None:
    replay = set_up(AllReplay(), [10, 12])
    assert sorted(np.concatenate(replay.plan(1).epoch(0)).tolist()) == list(range(22))


def test_fixed_memory_keeps_at_most_m_of_each_class() -> None:
    """Oracle 10, first part: <= m per class."""
    replay = set_up(FixedReplay(per_class=3), [40, 40])
    labels = replay.pool.labels[replay.memory[0]]
    assert max(Counter(labels.tolist()).values()) <= 3
    assert set(labels.tolist()) == {0, 1}


def test_four_fifths_of_the_memory_are_trained_on() -> None:
    """Oracle 10: ceil(0.8 n) of each class are trained on, the others are for validation; none is in both."""
    replay = set_up(FixedReplay(per_class=7, selection="random"), [40, 40])
    labels = replay.pool.labels
    for label in (0, 1):
        assert (labels[replay.memory[0]] == label).sum() == 6
        assert (labels[replay.val_memory[0]] == label).sum() == 1
    assert not set(replay.memory[0]) & set(replay.val_memory[0])
    assert replay.stored() == len(replay.memory[0]) + len(replay.val_memory[0])


FEWNERD = [30415, 24780, 51816, 101875, 34443, 29988, 12912, 24075, 15163, 14916]
ONTONOTES = [17932, 27842, 16288, 34221, 21156, 25248, 31235, 7818, 18138, 11645]
BBN = [4822, 6210, 2738, 5120, 46199, 7373, 5260, 6751, 2264, 2628]
TACRED = [651, 341, 2313, 2509, 667, 976, 1083, 248, 1469, 2755]


@pytest.mark.parametrize(
    ("sizes", "classes", "m", "limit", "max_copies", "expected", "sixteen"),
    [
        (FEWNERD, [7] * 6 + [6] * 4, 100, 2500, 10, [10, 10, 10, 10, 10, 1, 10, 1, 1], [13, 10, 10, 10, 1, 6, 3, 4, 4]),
        (
            ONTONOTES,
            [9] * 6 + [8] * 4,
            100,
            1250,
            10,
            [10, 10, 10, 10, 10, 10, 1, 10, 10],
            [10, 10, 10, 10, 10, 10, 2, 10, 1],
        ),
        (BBN, [5] * 6 + [4] * 4, 50, 500, 5, [5, 2, 5, 5, 5, 5, 5, 1, 1], [1, 10, 3, 5, 5, 1, 5, 3, 3]),
        ([4480] * 10, [8] * 10, 50, 400, 5, [5] * 9, [2, *[1] * 8]),
        (TACRED, [5] + [4] * 9, 20, 100, 5, [4, 5, 5, 5, 5, 5, 1, 5, 5], [12, 5, 5, 3, 1, 1, 3, 5, 5]),
        ([2507, 1013, 724, 777, 627], [4, 4, 4, 3, 3], 20, 100, 5, [5, 5, 5, 1], [5, 5, 3, 3]),
    ],
    ids=["fewnerd", "ontonotes", "bbn", "fewrel", "tacred", "ace2005"],
)
def test_copies_that_equal_the_compute_of_dynamic_sampling(
    sizes, classes, m, limit, max_copies, expected, sixteen
) -> None:
    """Oracle 10 and O13 of the authors' code: f for tasks 2..n at B = 8 and at B = 16."""
    for batch, copies in ((8, expected), (16, sixteen)):
        memories = [4 * m // 5 * sum(classes[:k]) for k in range(len(sizes))]
        computed = [
            copies_for_equal_compute(sizes[k], memories[k], limit, batch, max_copies) for k in range(1, len(sizes))
        ]
        assert computed == copies


def test_kmeans_selects_the_example_nearest_to_each_centre() -> None:
    """Oracle 10: of two tight groups the middle examples are selected."""
    vectors = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    assert kmeans_nearest(vectors, 2, seed=0) == [1, 4]


def test_herding_follows_the_mean() -> None:
    """The mean is 1: first 1, then 0 and 2, whose pair has that mean; ties go to the lower row."""
    assert herding(np.array([[0.0], [1.0], [2.0]]), 3) == [1, 0, 2]


def test_fixed_memory_is_mixed_in_as_copies() -> None:
    replay = set_up(FixedReplay(per_class=2, copies=3, selection="random"), [40, 10])
    rows = np.concatenate(replay.plan(1).epoch(0))
    counts = Counter(rows.tolist())
    assert all(counts[row] == 3 for row in replay.memory[0])
    assert all(counts[row] == 1 for row in range(40, 50))


SUPERNI = [142, 126, 1000, 338, 1000, 1000, 1000, 975, 1000, 1000, 1000, 160, 1000, 1000, 1000]


@pytest.mark.parametrize(
    ("size", "classes", "expected"),
    [(1000, 14, 20), (250, 3, 5), (160, 1, 3), (126, 1, 2), (338, 1, 6), (142, 1, 2), (975, 1, 19), (1000, 1000, 20), (9, 2, 1)],
)  # fmt: skip
def test_a_stored_share_of_a_task_contains_all_its_labels(size: int, classes: int, expected: int) -> None:
    """MixReplay: max(1, floor(0.02 n)) examples, with every label unless there are more labels than examples."""
    examples = pool([size, 5], classes)
    replay = ShareReplay()
    replay.setup(Encoded(examples, examples, examples), 0, 8)
    replay.update_memory(0, lambda rows: rows)
    labels = Counter(examples.labels[replay.memory[0]].tolist())
    assert len(set(replay.memory[0].tolist())) == sum(labels.values()) == expected
    if classes <= expected:
        assert len(labels) == classes
        assert min(labels.values()) >= expected // classes


def test_the_share_of_superni_is_232_examples() -> None:
    replay = set_up(ShareReplay(), SUPERNI, learned=15)
    assert replay.stored() == 232


def test_a_share_is_replayed_once_per_epoch() -> None:
    replay = set_up(ShareReplay(share=0.1), [40, 20, 30])
    rows = np.concatenate(replay.plan(2).epoch(0))
    assert sorted(rows.tolist()) == sorted([*replay.memory[0], *replay.memory[1], *range(60, 90)])
    assert sorted(np.concatenate(replay.memory_only_plan(2).epoch(0)).tolist()) == sorted(replay.memory_rows().tolist())


def test_a_share_of_zero_equals_no_replay() -> None:
    replay, none = set_up(ShareReplay(share=0), [40, 40]), set_up(NoReplay(), [40, 40])
    for a, b in zip(replay.plan(1).epoch(3), none.plan(1).epoch(3), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reservoir_is_a_uniform_sample_of_all_seen() -> None:
    """Each of 300 examples is in the reservoir with probability 60/300, whatever its task."""
    hits = np.zeros(300)
    for seed in range(200):
        replay = ReservoirReplay(capacity=60)
        examples = pool([100, 100, 100])
        replay.setup(Encoded(examples, examples, examples), seed, 8)
        for index in range(3):
            replay.update_memory(index, lambda rows: rows)
        assert replay.stored() == 60
        hits[replay.memory[0]] += 1
    assert stats.chisquare(hits.reshape(3, 100).sum(1)).pvalue > 0.001
    assert hits.mean() == 200 * 60 / 300


@pytest.mark.parametrize(
    "replay", [AllReplay(), DynamicReplay(), FixedReplay(per_class=2), ReservoirReplay(capacity=9), ShareReplay()]
)
def test_state_round_trip_gives_the_same_batches(replay) -> None:
    before = set_up(replay, [20, 20, 20])
    state = before.state()
    after = type(replay)(**{k: v for k, v in vars(replay).items() if k in type(replay).__dataclass_fields__})
    after.setup(Encoded(before.pool, before.val_pool, before.pool), 0, 8)
    after.load(state)
    for a, b in zip(before.plan(2).epoch(0), after.plan(2).epoch(0), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "make", [lambda: DynamicReplay(ratio=0), lambda: DynamicReplay(kind="all"), lambda: DynamicReplay(limit=1),
             lambda: FixedReplay(per_class=0), lambda: FixedReplay(selection="best"), lambda: ReservoirReplay(capacity=0), lambda: ShareReplay(share=2)]
)  # fmt: skip
def test_settings_out_of_range_are_rejected(make) -> None:
    with pytest.raises(ConfigError):
        make()
