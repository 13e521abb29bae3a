"""N-LoRA, MIGU, SLAO, SD-LoRA, LoRI and zero-shot: numbers by hand, and what must not change."""

import pytest
import torch

from clpet.errors import ConfigError, ModelError
from clpet.methods import migu, n_lora, slao
from clpet.methods.lori import largest_entries
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
