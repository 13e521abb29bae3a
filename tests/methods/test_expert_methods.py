"""MoE-LoRA, CL-MoE and I-LoRA: several experts or adapters side by side, with numbers by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from clpet.errors import ConfigError
from clpet.methods import cl_moe, ilora, moe_lora
from clpet.methods.components.second_weights import SecondWeights
from clpet.models.stacked_lora import low_rank_product
from clpet.runtime.distributed import get_world
from clpet.training.step import StepContext
from tests.conftest import double, scores


def test_the_experts_of_moe_lora_by_hand() -> None:
    x, router = double([[1, 2]]), double([[0.1, 0.2], [-0.3, 0.4], [0.5, -0.1]])
    weights = moe_lora.expert_weights(x, router)
    assert weights[0].tolist() == pytest.approx([0.354770, 0.354770, 0.290461], abs=1e-6)
    stacked_A, stacked_B = double([[1, 0], [0, 1], [1, -1]]), double([[1, 2, 0], [1, -1, 0.5]])
    branch = 2 * low_rank_product(x, stacked_A, stacked_B, weights)
    assert branch[0].tolist() == pytest.approx([3.547696, -1.0], abs=1e-5)
    top = 2 * low_rank_product(x, stacked_A, stacked_B, moe_lora.expert_weights(x, router, 2))
    assert top[0].tolist() == pytest.approx([5, -1], abs=1e-5)


def test_one_expert_is_a_lora(make) -> None:
    run = make("method=moe_lora", "method.experts=1", "train.epochs=1")
    run.learn(0)
    answers, rows = scores(run, run.data.test.rows_of(0)), run.data.test.rows_of(0)
    for layer in run.method.stack.layers.values():
        layer.router = None
    assert torch.allclose(scores(run, rows), answers, atol=1e-6)
    with pytest.raises(ConfigError, match="cannot be divided"):
        make("method=moe_lora", "method.experts=3")


@pytest.mark.parametrize(
    ("roles", "expected"), [("comment", [0.7, 1.7, 3.1, 4.5]), ("published", [0.3, 1.3, 1.9, 2.5])]
)
def test_the_averages_of_cl_moe_by_hand(roles: str, expected: list[float]) -> None:
    """Four experts, of which the earlier task has used the first two and this one the second and third."""
    before, now = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
    share = cl_moe.earlier_shares(before, now, 0.7, cl_moe.Roles(roles)).double()
    assert cl_moe.averaged(double([1, 1, 1, 1]), double([0, 2, 4, 6]), share).tolist() == pytest.approx(expected)


def test_the_experts_of_a_token_by_hand() -> None:
    """Of equal weights the lower index counts; padding does not."""
    weights = double([[[0.5, 0.2, 0.3], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]]])
    assert cl_moe.tokens_of_experts(weights, torch.tensor([[1, 1, 0]]), 2).tolist() == [[2, 1, 1]]
    assert cl_moe.tokens_of_experts(weights, None, 1).tolist() == [[2, 0, 1]]


def test_the_task_weights_of_cl_moe_by_hand(make) -> None:
    """Half the router's weights, half the shares of the task's experts; a task to come has the router's alone."""
    run = make("method=cl_moe", "method.experts=4", "method.task_id_at_test=true")
    method, layer = run.method, next(iter(run.method.stack.layers.values()))
    x = torch.zeros(2, 3, layer.d_in)  # the router weights all experts equally
    method.usage = [torch.tensor([[6.0, 6, 0, 0]]).expand(len(method.stack.layers), 4)]
    method.task_weights = method.task_shares(torch.tensor([0, 1]))
    weights = layer.router(x)
    assert weights[0, 0].tolist() == [0.375, 0.375, 0.125, 0.125]
    assert weights[1, 2].tolist() == [0.25] * 4
    router = double([[0.354770, 0.354770, 0.290461]])
    mixed = cl_moe.with_task(router, double([[0.25, 0.25, 0]]))
    stacked_A, stacked_B = double([[1, 0], [0, 1], [1, -1]]), double([[1, 2, 0], [1, -1, 0.5]])
    branch = 2 * low_rank_product(double([[1, 2]]), stacked_A, stacked_B, mixed)
    assert branch[0].tolist() == pytest.approx([4.273848, -1], abs=1e-5)


def test_cl_moe_averages_the_experts_and_not_the_routers(make) -> None:
    run = make("method=cl_moe", "train.epochs=1")
    run.learn(0)
    method = run.method
    rows = run.data.train.rows_of(0)
    tokens = int(run.data.train.lengths[rows].sum())
    assert all(usage.sum() == 2 * tokens for usage in method.usage[0])
    before = {name: value.detach().clone() for name, value in method.named_parameters().items()}
    trained = {}
    average = method.average
    method.average = lambda: (
        trained.update({name: value.detach().clone() for name, value in method.named_parameters().items()}),
        average(),
    )
    run.learn(1)
    after = method.named_parameters()
    chosen = cl_moe.largest(torch.stack(method.usage), 2)
    for number, name in enumerate(method.stack.layers):
        preserved = chosen[0, number] & ~chosen[1, number]
        share = torch.where(preserved, 0.7, 0.3).repeat_interleave(2)
        one, two = f"4.{name}.A", f"4.{name}.B"
        assert torch.allclose(after[one], share[:, None] * before[one] + (1 - share[:, None]) * trained[one])
        assert torch.allclose(after[two], share * before[two] + (1 - share) * trained[two])
        assert torch.equal(after[f"{name}.router"], trained[f"{name}.router"])
    method.counts = cl_moe.Counts("all")
    assert torch.equal(method.usage_of_tasks()[:, 1], torch.stack(method.usage).sum(1))


def test_the_slow_adapter_by_hand() -> None:
    fast = {"a": nn.Parameter(double([1, 0, -1]))}
    for keep, expected in ((0.25, [0.484375, 0.656250, 0.593750]), (0.75, None), (0.999, [0.5, 0.875, 0.375])):
        with torch.no_grad():
            fast["a"].copy_(double([1, 0, -1]))
        slow = SecondWeights(None, fast)
        for step, values in enumerate(([0, 2, 1], [0.5, 1, 1], [0.5, 0.5, 0.5]), 1):
            with torch.no_grad():
                fast["a"].copy_(double(values))
            slow.average(ilora.share_kept(step, keep))
        assert expected is None or slow.tensors["a"].tolist() == pytest.approx(expected)


def test_the_distance_in_the_loss_of_ilora_is_that_of_its_blocks(make) -> None:
    """weight times the mean over blocks, old examples, tokens and units of relu(h_S - h_F)^2."""
    run = make("method=ilora", "method.weight=3")
    method, pool = run.method, run.data.train
    method.grow_head(0)
    method.grow_head(1)
    method.learned = 1
    for value in method.second.tensors.values():
        value.add_(0.05)
    rows = np.concatenate([pool.rows_of(1)[:2], pool.rows_of(0)[:3]])  # the last three are old
    context = StepContext(1, "", 0, 0, rows, pool, pool.batch(rows))
    method.before_step(context)
    loss = method.loss(context).item()
    with torch.no_grad():
        with method.recorded() as fast:
            cross_entropy = method.objective.loss(context.batch).item()
        with method.second.active(), method.recorded() as slow:
            method.objective.loss(context.batch)
    distances = []
    for name, block in fast.items():
        for example in (2, 3, 4):
            tokens = context.batch.attention_mask[example].bool()
            gap = slow[name][example][tokens] - block[example][tokens]
            distances.append(gap.clamp(min=0).square().mean().item())
    assert loss - cross_entropy == pytest.approx(3 * np.mean(distances), rel=1e-4)
    assert np.mean(distances) > 1e-4


def test_the_distance_of_hidden_states_by_hand() -> None:
    """Padding does not count."""
    fast, slow = double([[[1, -2], [0.5, 0.5], [9, 9]]]), double([[[0.5, -1], [1, 0], [0, 0]]])
    mask = double([[1, 1, 0]])
    assert ilora.difference(fast, slow, mask, True).item() == pytest.approx(0.3125)
    assert ilora.difference(fast, slow, mask, False).item() == pytest.approx(0.4375)


def test_ilora_without_the_distance_and_with_the_fast_adapter_is_replay(make) -> None:
    weights = []
    for words in (["method=ilora", "method.weight=0", "method.answer=fast"], ["method=replay", "replay=reservoir"]):
        run = make(*words, "train.epochs=1")
        run.learn(0)
        run.learn(1)
        weights.append(torch.cat([value.detach().flatten() for value in run.method.parameters()]))
    assert torch.equal(*weights)


def test_ilora_runs_equally_many_passes_on_the_ranks_of_a_sharded_backbone(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without old examples of its own runs the slow adapter as well, and its loss stays the same."""
    run = make("method=ilora")
    pool, method = run.data.train, run.method
    method.grow_head(0)
    method.grow_head(1)
    method.learned, passes = 1, []
    method.objective.adapters.model.register_forward_hook(lambda *_: passes.append(1))
    new, old = pool.rows_of(1)[:2], pool.rows_of(0)[:1]
    losses = []
    for sharded, rows in ((False, [*new, *old]), (True, new), (True, [*new, *old])):
        monkeypatch.setattr(get_world(), "sharded", sharded)
        context = StepContext(1, "", 0, 0, np.array(rows), pool, pool.batch(new))
        method.before_step(context)
        losses.append(method.loss(context).item())
        passes.append(0)
    assert passes == [1, 0, 1, 0, 1, 1, 0]
    assert losses == [losses[0]] * 3


@pytest.mark.slow
def test_ilora_does_not_depend_on_micro_batches(make) -> None:
    weights = []
    for size in ("null", "4"):
        run = make(
            "method=ilora", f"hardware.micro_batch_size={size}", "train.lr=1e-4", "train.eps=1e-3", "method.weight=50"
        )
        run.learn(0)
        run.learn(1)
        weights.append(torch.cat([value.detach().flatten() for value in run.method.parameters()]))
    assert torch.allclose(*weights, atol=1e-5)
