"""Keys and weights against numbers computed by hand: retrieval, training, and dropout of keys."""

import pytest
import torch
import torch.nn.functional as F

from clpet.errors import ConfigError
from clpet.methods.components.key_retrieval import (
    KeyLearning,
    RetrievalStats,
    cosines,
    key_loss,
    majority,
    num_uniform,
    orthonormal,
    retrieve,
)


def silent(*_: object) -> None: ...


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_first_keys_are_orthonormal_in_every_group() -> None:
    keys = orthonormal(6, 4, 64, seed=3)
    assert torch.allclose(keys @ keys.mT, torch.eye(4).expand(6, 4, 4), atol=1e-5)
    assert torch.equal(keys, orthonormal(6, 4, 64, seed=3))
    assert torch.allclose(orthonormal(2, 5, 5, 0) @ orthonormal(2, 5, 5, 0).mT, torch.eye(5).expand(2, 5, 5), atol=1e-5)


def test_cosines_see_directions_alone() -> None:
    """Rescaling chunks or keys changes nothing, nor does permuting keys together with their values."""
    queries, keys, values = drawn(5, 3, 8), drawn(3, 7, 8, seed=1), drawn(7, 4, seed=2)
    sigma = cosines(queries, keys)
    scaled = cosines(queries * torch.rand(5, 3, 1) * 9 + queries, keys * (torch.rand(3, 7, 1) + 0.1))
    assert torch.allclose(sigma, scaled, atol=1e-6)
    assert torch.allclose(
        cosines(queries[:, :1], keys[:1])[:, 0], F.cosine_similarity(queries[:, :1], keys[:1], dim=2), atol=1e-6
    )
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    mixed = retrieve(sigma, 3).weights[:, 0] @ values
    assert torch.allclose(retrieve(sigma[:, :, order], 3).weights[:, 0] @ values[order], mixed, atol=1e-6)


def test_weights_are_shares_of_the_chosen_similarities() -> None:
    sigma = torch.tensor([[[0.6, 0.5, 0.4, 0.3]]])
    expected = {4: [1 / 3, 0.27778, 0.22222, 0.16667], 2: [0.54545, 0.45455, 0, 0], 1: [1.0, 0, 0, 0]}
    for k, weights in expected.items():
        mixture = retrieve(sigma, k)
        assert torch.allclose(mixture.weights[0, 0], torch.tensor(weights), atol=1e-5)
        assert abs(mixture.weights.sum().item() - 1) < 1e-6
        assert mixture.picks[0, 0].tolist() == list(range(k))
    assert retrieve(sigma, 4, uniform=True).weights[0, 0].tolist() == [0.25] * 4
    negative = retrieve(torch.tensor([[[0.6, -0.1]]]), 2).weights[0, 0]
    assert torch.allclose(negative, torch.tensor([1.2, -0.2]), atol=1e-5)


def test_groups_are_averaged_or_choose_for_themselves() -> None:
    """Two groups, three keys: averages (.5, .3, .4), or the best key of each group with weights over both groups."""
    sigma = torch.tensor([[[0.9, 0.2, 0.3], [0.1, 0.4, 0.5]]])
    shared = retrieve(sigma, 2)
    assert torch.allclose(shared.weights, torch.tensor([[[0.5 / 0.9, 0, 0.4 / 0.9]]]), atol=1e-6)
    apart = retrieve(sigma, 1, per_group=True)
    assert torch.allclose(apart.weights, torch.tensor([[[0.9 / 1.4, 0, 0], [0, 0, 0.5 / 1.4]]]), atol=1e-6)
    assert apart.picks.tolist() == [[[0], [2]]]
    assert torch.allclose(retrieve(sigma, 2, per_group=True, uniform=True).weights.sum((1, 2)), torch.ones(1))


def test_branches_are_task_by_task_and_group_by_group() -> None:
    """Two tasks of two keys, two groups: [t0 g0 k0, t0 g0 k1, t0 g1 k0, ..., t1 g1 k1]."""
    mixture = retrieve(torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]]), 4, per_group=True)
    expected = torch.tensor([[0.1, 0.2, 0.5, 0.6, 0.3, 0.4, 0.7, 0.8]]) / 3.6
    assert torch.allclose(mixture.branches(2), expected, atol=1e-6)
    assert mixture.owners(2).tolist() == [[1, 1, 0, 0] * 2]


def test_a_forbidden_key_is_never_chosen() -> None:
    """If -100 replaced the similarity of a forbidden key, its weight would be 1.018."""
    sigma = torch.tensor([[[0.6, 0.5, 0.4, 0.3, 0.9]]])
    allowed = torch.tensor([[True, True, True, True, False]])
    for k in range(1, 6):
        mixture = retrieve(sigma, k, allowed=allowed)
        assert mixture.weights[0, 0, 4] == 0
        assert abs(mixture.weights.sum().item() - 1) < 1e-6
        assert 4 not in mixture.picks.flatten().tolist()
    none = retrieve(sigma, 2, allowed=torch.zeros(1, 5, dtype=torch.bool))
    assert none.weights.tolist() == [[[0.0] * 5]]
    assert none.owners(1).tolist() == [[-1, -1]]


def test_similarities_that_sum_up_to_zero_give_uniform_weights() -> None:
    sigma = torch.tensor([[[0.5, -0.5, -0.9]], [[0.5, 0.4, 0.1]]])
    assert retrieve(sigma, 2).weights[0, 0].tolist() == [0.5, 0.5, 0]
    assert num_uniform(sigma, 2, per_group=False) == 1


def test_a_batch_together_has_one_mixture() -> None:
    """Keys are chosen by mean similarity, whatever the order in the batch; items alone get other mixtures."""
    sigma = torch.tensor([[[0.9, 0.1, 0.2]], [[0.1, 0.9, 0.4]]])
    weights = retrieve(sigma, 1, batch_mean=True).weights
    assert weights.tolist() == [[[1, 0, 0]], [[1, 0, 0]]] or weights.tolist() == [[[0, 1, 0]], [[0, 1, 0]]]
    both = retrieve(sigma, 2, batch_mean=True).weights
    assert torch.allclose(both, torch.tensor([0.5, 0.5, 0]).expand(2, 1, 3))
    assert torch.allclose(retrieve(sigma.flip(0), 2, batch_mean=True).weights, both)
    assert not torch.allclose(retrieve(sigma, 2).weights, both)
    same = sigma[:1].expand(4, -1, -1)
    assert torch.allclose(
        retrieve(same, 2, batch_mean=True).weights, retrieve(sigma[:1], 2).weights.expand(4, -1, -1), atol=1e-6
    )


def test_one_key_becomes_the_mean_of_the_unit_queries() -> None:
    """The fixed point of stage 1."""
    queries = drawn(64, 2, 8) + drawn(1, 2, 8, seed=5) * 2
    stage = KeyLearning(top_k=1, dropout=0.0, epochs=1, min_steps=3000, batch_size=64, lr=1e-2, clip=0)
    keys = stage.learn(queries, orthonormal(2, 1, 8, 0), 0, silent, dry_run=False)
    mean = F.normalize(queries, dim=2).mean(0)
    assert (F.cosine_similarity(keys[:, 0], mean, dim=1) > 1 - 1e-5).all()


def test_the_key_loss_turns_chosen_keys_alone() -> None:
    """The gradient is orthogonal to a key, and 0 for keys that are not chosen or are dropped; L is in [-1, 1]."""
    queries = drawn(4, 3, 8)
    keys = drawn(3, 5, 8, seed=1).requires_grad_()
    draws = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(2))
    stage = KeyLearning(top_k=2, dropout=0.4)
    loss = stage.loss(queries, keys, draws)
    loss.backward()
    assert -1 <= loss.item() <= 1
    assert torch.allclose((keys.grad * keys).sum(2), torch.zeros(3, 5), atol=1e-6)
    sigma = cosines(queries, keys).detach().masked_fill(draws < 0.4, float("-inf"))
    best = sigma.topk(2, -1)
    chosen = torch.zeros(4, 3, 5).scatter(2, best.indices, best.values.isfinite().float()).any(0)
    assert ((keys.grad != 0).any(2) == chosen).all()
    assert not chosen.all()


def test_a_dropped_key_is_replaced_by_what_is_left() -> None:
    """With two keys and K = 2 the remaining key counts; an item without any is excluded from the mean."""
    sigma = torch.tensor([[[0.8, 0.4]], [[0.6, 0.2]], [[0.1, 0.1]]], requires_grad=True)
    dropped = torch.tensor([[[False, False]], [[False, True]], [[True, True]]])
    loss = key_loss(sigma, 2, dropped)
    assert loss.item() == pytest.approx(-(0.6 + 0.6) / 2)
    loss.backward()
    assert torch.allclose(sigma.grad, torch.tensor([[[-0.25, -0.25]], [[-0.5, 0]], [[0.0, 0.0]]]))


def test_dropout_of_keys_has_its_rate_and_touches_the_choice_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is within p +- 3 sigma over a whole stage; dropout does not change the other similarities."""
    from clpet.methods.components import key_retrieval

    masks, original = [], key_retrieval.key_loss

    def keep(sigma: torch.Tensor, top_k: int, dropped: torch.Tensor) -> torch.Tensor:
        masks.append(dropped)
        return original(sigma, top_k, dropped)

    monkeypatch.setattr(key_retrieval, "key_loss", keep)
    stage = KeyLearning(dropout=0.2, epochs=2, min_steps=0, batch_size=50)
    stage.learn(drawn(500, 6, 8), orthonormal(6, 4, 8, 0), 0, silent, dry_run=False)
    drops = torch.cat([mask.flatten() for mask in masks]).float()
    assert len(drops) == 2 * 500 * 24
    assert abs(drops.mean().item() - 0.2) < 3 * (0.2 * 0.8 / len(drops)) ** 0.5
    assert key_loss(torch.tensor([[[0.9, 0.3]]]), 1, torch.tensor([[[True, False]]])).item() == pytest.approx(-0.3)


def test_learning_is_the_same_for_the_same_seed_and_different_for_another() -> None:
    queries, start = drawn(40, 2, 8), orthonormal(2, 3, 8, 0)
    runs = [KeyLearning(min_steps=20).learn(queries, start, seed, silent, False) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_how_long_a_stage_is() -> None:
    """115,000 texts in batches of 32 for 5 epochs are 17,970 steps; small tasks are repeated."""
    epochs, steps = KeyLearning(epochs=5, batch_size=32, min_steps=500).length(115_000)
    assert (steps, epochs * steps) == (3594, 17_970)
    assert KeyLearning(epochs=3, batch_size=16, min_steps=500).length(64) == (125, 4)


def test_only_separated_tasks_are_recognised() -> None:
    """Well separated Gaussian tasks are always recognised, three equal ones in a third of the cases."""

    def votes(distance: float) -> list[float]:
        centres = drawn(3, 1, 2, 16) * distance
        train, test = (centres + drawn(3, 300, 2, 16, seed=seed) for seed in (1, 2))
        learned = [KeyLearning().learn(train[t], orthonormal(2, 4, 16, t), t, silent, False) for t in range(3)]
        mixture = retrieve(cosines(test.flatten(0, 1), torch.cat(learned, 1)), 4)
        right = majority(mixture.owners(4), 3).view(3, -1) == torch.arange(3)[:, None]
        picks = mixture.owners(4).view(3, -1) == torch.arange(3)[:, None]
        return [right.float().mean().item(), picks.float().mean().item()]

    assert votes(10.0) == [1.0, 1.0]
    vote, pick = votes(0.0)
    assert vote < 0.4
    assert abs(pick - 1 / 3) < 0.04


def test_majority_is_more_than_half() -> None:
    owners = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 1], [1, 1, 1, 1], [-1, -1, -1, -1], [0, 1, 2, 0]])
    assert majority(owners, 3).tolist() == [-1, 2, 1, -1, -1]


def test_retrieval_stats_counts_votes_and_right_picks() -> None:
    stats = RetrievalStats(2)
    stats.add(torch.tensor([0, 0, 1, 1]), torch.tensor([0, -1, 0, 1]), torch.tensor([1.0, 0.5, 0.25, 0.75]))
    assert stats.votes.tolist() == [[1, 0, 1], [1, 1, 0]]
    assert stats.figures(["a", "b"]) == {
        "right_picks": 62.5, "vote/a": 50, "vote/b": 50, "picks/a": 75, "picks/b": 50,
    }  # fmt: skip
    twin = RetrievalStats(2)
    twin.load(stats.state())
    assert twin.figures(["a"]) == stats.figures(["a"])


@pytest.mark.parametrize(
    ("option", "value"), [("top_k", 0), ("dropout", 1.0), ("lr", -1), ("decay_at", 0), ("epochs", 0)]
)
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"method\.stage1\.{option} must be"):
        KeyLearning(**{option: value})
