"""N-LoRA, MIGU, SLAO, SD-LoRA, LoRI, MoE-LoRA, CL-MoE and I-LoRA: numbers by hand, and what must not change."""

import numpy as np
import pytest
import torch
from torch import nn

from clpet.errors import ConfigError, ModelError
from clpet.methods import cl_moe, ilora, migu, moe_lora, n_lora, slao
from clpet.methods.components.second_weights import SecondWeights
from clpet.methods.lori import largest_entries
from clpet.models.stacked_lora import low_rank_product
from clpet.runtime.distributed import get_world
from clpet.training.optimizers import Undecayed
from clpet.training.step import StepContext
from tests.conftest import double, scores

A, B = double([[1, -2, 0], [0.5, 0, 3]]), double([[2, 0], [-1, 1], [0, 0.5]])


@pytest.mark.parametrize(("penalty", "value"), [("update", 13.25), ("code", 8.5), ("factors", 11.0)])
def test_the_penalties_of_n_lora_by_hand(penalty: str, value: float) -> None:
    assert n_lora.PENALTIES[n_lora.Penalty(penalty)](A, B).item() == pytest.approx(value)


def test_the_gradient_of_n_lora_by_hand() -> None:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    n_lora.of_update(a, b).backward()
    assert a.grad.tolist() == [[3, -3, -1], [-0.5, 1, 1.5]]
    assert b.grad.tolist() == [[3, 0.5], [-3, 2.5], [1, 3.5]]


def test_n_lora_penalises_the_new_branch_alone(make) -> None:
    run = make("method=n_lora")
    run.learn(0)
    run.method.add_branch(1)
    assert run.method.step_loss(None) == 0  # B of the new branch is 0
    run.method.weight = 0.0
    assert run.method.step_loss(None) is None


def test_n_lora_refuses_code_for_layers_that_are_not_square(make) -> None:
    with pytest.raises(ConfigError, match="needs square layers"):
        make("method=n_lora", "method.penalty=code", "peft.targets=all-linear")


def test_the_mask_of_migu_by_hand() -> None:
    total = double([[1, -2, 0.5, 0, 3], [0, 1, -0.5, 2, -1]]).abs().sum(0)
    assert total.tolist() == [1, 3, 1, 2, 4]
    assert migu.large(total, 0.7).tolist() == [False, True, False, False, True]
    assert migu.large(torch.ones(4), 0.7).all()
    counts = [int(migu.large(torch.arange(n).float(), 0.7).sum()) for n in (8, 32, 768, 1024)]
    assert counts == [3, 10, 231, 307]


@pytest.mark.parametrize("size", ["null", "5"])
def test_migu_changes_only_rows_of_large_outputs(size: str, make) -> None:
    """Strictly: also with weight decay, and the same rows for every division into micro-batches."""
    run = make("method=migu", "method.strict=true", "train.weight_decay=0.1", f"hardware.micro_batch_size={size}",
               "train.epochs=1", "train.global_batch_size=24")  # fmt: skip
    run.learn(0)
    method = run.method
    before = {name: module.weight.detach().clone() for name, module in method.maps.items()}
    run.learn(1)
    for name, module in method.maps.items():
        changed = (module.weight != before[name]).any(1)
        assert torch.equal(changed, method.rows[name])
        assert 0 < changed.sum() < len(changed)


def test_migu_does_not_add_repeated_rows(make) -> None:
    """A sharded rank without rows left repeats one, for the pass alone."""
    run = make("method=migu")
    run.method.grow_head(0)
    context = StepContext.of(run.data.train.batch(run.data.train.rows_of(0)[:3]))
    found = []
    for context.counts in (False, True):
        run.method.before_step(context)
        run.method.loss(context)
        found.append([bool(total.any()) for total in run.method.sums.values()])
    assert not any(found[0])
    assert any(found[1])


@pytest.mark.slow
def test_migu_masks_nothing_at_quantile_0(make) -> None:
    weights = []
    for words in (["method=migu", "method.quantile=0"], ["method=sequential"]):
        run = make(*words, "train.epochs=1")
        run.learn(0)
        run.learn(1)
        weights.append(torch.cat([value.detach().flatten() for value in run.method.parameters()]))
    assert torch.equal(*weights)


def test_slao_by_hand() -> None:
    rows = slao.orthonormal_rows(double([[3, 0, 4, 0], [1, 2, 2, 1]]))
    expected = double([[0.6, 0, 0.8, 0], [-0.140872, 0.880451, 0.105654, 0.440225]])
    assert torch.allclose(rows, expected, atol=1e-6)
    trained = [double(values) for values in ([[1, 2], [0, -1]], [[2, 0], [1, 1]], [[0, 4], [-1, 3]])]
    second = slao.merged(trained[0], trained[1], 1)
    assert torch.allclose(second, double([[1.707107, 0.585786], [0.707107, 0.414214]]), atol=1e-6)
    third = slao.merged(second, trained[2], 2)
    assert torch.allclose(third, double([[0.721508, 2.556984], [-0.278492, 1.907118]]), atol=1e-6)


def test_slao_answers_with_the_merged_lora(make) -> None:
    """After one task it is the trained one; answering does not change the weights of training."""
    run = make("method=slao", "train.epochs=1")
    run.learn(0)
    method, trained = run.method, run.method.second.trained
    assert all(torch.equal(method.second.tensors[name], value) for name, value in trained.items())
    run.learn(1)
    assert any(not torch.equal(method.second.tensors[name], value) for name, value in trained.items())
    before = {name: value.detach().clone() for name, value in trained.items()}
    answers = scores(run, run.data.test.rows_of(0))
    assert all(torch.equal(before[name], value) for name, value in trained.items())
    method.second.restore()
    method.second.follow()
    assert torch.equal(scores(run, run.data.test.rows_of(0)), answers)


@pytest.mark.parametrize(("restart", "first"), [(True, 0.8), (False, 2.529822)])
def test_the_branches_of_sd_lora_by_hand(restart: bool, first: float, make) -> None:
    """A1 = [1, 0, 1], B1 = [2, 0, 1] in all layers, then A2 = [0, 1, 1], B2 = [1, -1, 0]; all else is 0."""
    method = make("method=sd_lora", f"method.restart={str(restart).lower()}", "peft.r=1", "peft.alpha=1").method
    for index, (A, B) in enumerate((([1, 0, 1], [2, 0, 1]), ([0, 1, 1], [1, -1, 0]))):
        method.add_branch(index)
        for layer in method.stack.layers.values():
            with torch.no_grad():
                layer.A.zero_()[0, :3] = torch.tensor(A)
                layer.B.zero_()[:3, 0] = torch.tensor(B)
    assert method.lengths.tolist() == pytest.approx([first, 0.8], abs=1e-6)
    assert isinstance(method.lengths, Undecayed)
    layer = next(iter(method.stack.layers.values()))
    x, nothing = torch.zeros(1, 1, layer.d_in), torch.zeros(1, 1, layer.d_out)
    x[..., :3] = torch.tensor([1, 2, 3])
    with method.answering():
        increment = layer.forward(layer.module, (x,), nothing)[0, 0, :3].tolist()
    expected = [first / 0.8 * 2.023858 + 4, -4, first / 0.8 * 1.011929]  # 6.023858, -4 and 1.011929 with lengths of 0.8
    assert increment == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("restart", ["false", "true"])
def test_freezing_a_direction_keeps_the_function_unless_lengths_restart(restart: str, make) -> None:
    run = make("method=sd_lora", f"method.restart={restart}", "train.epochs=1")
    run.learn(0)
    method, rows = run.method, run.data.test.rows_of(0)
    before = scores(run, rows)
    method.add_branch(1)
    assert torch.allclose(scores(run, rows), before, atol=1e-5) == (restart == "false")
    assert method.lengths.tolist()[1] == pytest.approx(0.8)


def test_sd_lora_trains_all_lengths_and_exports_them(make) -> None:
    run = make("method=sd_lora", "train.epochs=1")
    run.learn(0)
    first = run.method.lengths.item()
    run.learn(1)
    method, rows = run.method, run.data.test.rows_of(0)
    assert len(method.lengths) == 2
    assert first != pytest.approx(0.8, abs=1e-6)
    answers = scores(run, rows)
    method.merged()
    with torch.no_grad():
        merged = method.objective.head.scatter(method.objective.features(run.data.test.batch(rows)))
    assert torch.allclose(merged, answers, atol=1e-4)


FACTORS = {
    "one": double([[0.1, -0.5, 0.3, 0.02], [0.4, -0.15, 0.25, 0.01]]),
    "two": double([[-0.9, 0.04], [0.2, 0.6], [0.05, -0.07], [0.35, -0.45], [0.12, 0.33], [0.08, -0.22]]),
}


def test_the_masks_of_lori_by_hand() -> None:
    masks = largest_entries(FACTORS, 0.9)
    assert not masks["one"].any()
    assert torch.nonzero(masks["two"]).tolist() == [[0, 0], [1, 1]]
    masks = largest_entries(FACTORS, 0.5)
    assert masks["one"].int().tolist() == [[0, 1, 1, 0], [1, 0, 1, 0]]
    assert masks["two"].int().tolist() == [[1, 0], [0, 1], [0, 0], [1, 1], [0, 1], [0, 1]]
    other = largest_entries(FACTORS, 0.5, masks)
    assert not any((masks[name] & other[name]).any() for name in masks)
    with pytest.raises(ConfigError, match=r"needs 12 of the 10 entries"):
        largest_entries(FACTORS, 0.4, masks)


def test_entries_that_have_not_changed_are_in_no_mask_of_lori() -> None:
    masks = largest_entries({"one": double([0, 0, 0, 0, 0, 0, 0, 0, 0, 2])}, 0.5)
    assert masks["one"].int().tolist() == [0] * 9 + [1]


def test_migu_never_masks_tied_embeddings(make) -> None:
    words = ["objective=text_to_text", "benchmark.max_target=8", "peft=none", "method=migu"]
    with pytest.raises(ModelError, match="finds no trained linear layer"):  # GPT-2 has no other nn.Linear
        make("model=tiny_gpt2", *words)
    method = make("model=tiny_t5", *words).method
    assert method.maps
    embedding = method.objective.adapters.model.get_input_embeddings().weight
    assert all(module.weight is not embedding for module in method.maps.values())


def test_lori_changes_only_the_entries_in_the_mask(make) -> None:
    run = make("method=lori", "train.epochs=1", "train.weight_decay=0.1", "method.disjoint=true", "method.sparsity=0.8")
    run.learn(0)
    method = run.method
    tensors = method.objective.adapters.tensors("default")
    before, used = {name: value.detach().clone() for name, value in tensors.items()}, dict(method.used)
    run.learn(1)
    for name, value in tensors.items():
        changed = value != before[name]
        assert not changed[~method.mask[name]].any() if name in method.mask else not changed.any()
        assert name not in used or not (used[name] & method.mask[name]).any()
    assert any((tensors[name] != before[name]).any() for name in method.mask)
    head = sum(value.numel() for value in method.objective.parameters().values())
    assert method.stored_parameters() == head + sum(value.numel() for value in tensors.values())  # masks are none


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


def test_zero_shot_is_the_bare_model(make) -> None:
    words = ["objective=text_to_text", "model=tiny_llama", "benchmark.max_target=8", "evaluation.decode=rank"]
    run = make("method=zero_shot", *words)
    batch = run.data.test.batch(run.data.test.rows_of(0)[:4])
    with torch.inference_mode():
        before = run.method.predict(batch, run.method.choices(batch, range(12))).texts
        run.learn(0)
        assert run.method.predict(batch, run.method.choices(batch, range(12))).texts == before
    assert run.method.stored_parameters() == 0
    with pytest.raises(ConfigError, match="a head that is not trained is random"):
        make("method=zero_shot")
