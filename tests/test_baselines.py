"""The baselines with increments, prompts and routers, and the forms of EWC and LwF, against numbers worked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clpet.increments import product
from clpet.methods import gain_lora, l2p, lwf, mocl, o_lora, sapt
from clpet.methods.base import Choices
from clpet.methods.ewc import Merge, merged
from clpet.methods.inf_lora import projected
from clpet.methods.replay import Static
from clpet.selection import stratified
from clpet.subspace import extended, threshold

from .conftest import tiny_args

INCREMENTS = ["inc_lora", "o_lora", "sapt", "mocl", "inf_lora", "gain_lora"]
ROUTED = ["sapt", "mocl", "gain_lora", "l2p"]


def double(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scores(run, rows: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return run.method.predict(run.data.test.batch(rows), Choices(range(12))).scores


# O-LoRA


def test_orthogonality_is_a_sum_of_absolute_values() -> None:
    """Oracle 1: |A_prev A_new^T| = [[.5, 2], [.5, 1]] sums to 4; the norm of A_new is not squared."""
    old, new = double([[1, 0, 0, 2], [0, 1, 1, 0]]), double([[0.5, 0.5, 0, 0], [0, 0, 1, -1]])
    assert o_lora.overlap(old, new).item() == 4.0
    assert new.norm().item() == pytest.approx(1.5811388301, abs=1e-10)


def test_o_lora_adds_both_terms_of_its_formula(make) -> None:
    run = make("method=o_lora", "method.orthogonality=[0,0.5,5]", "method.decay=0.1")
    run.learn(0)
    run.learn(1)
    method, batch = run.method, run.data.train.batch(run.data.train.rows_of(1)[:8])
    layers = method.increments.layers.values()
    found = method.loss(batch).item() - method.mixed_loss(batch, None).item()
    overlap = sum((layer.A @ layer.a.T).abs().sum().item() for layer in layers)
    norms = sum(layer.a.square().sum().sqrt().item() + layer.b.square().sum().sqrt().item() for layer in layers)
    assert overlap > 0
    assert found == pytest.approx(0.5 * overlap + 0.1 * norms, rel=1e-4)


def test_o_lora_without_its_terms_is_inc_lora(make) -> None:
    found = []
    for method in (["inc_lora"], ["o_lora", "method.orthogonality=0"]):
        run = make(f"method={method[0]}", *method[1:])
        run.learn(0)
        run.learn(1)
        found.append(torch.cat([tensor.detach().flatten() for tensor in run.method.parameters()]))
    assert torch.equal(*found)


def test_orthogonality_keeps_branches_apart(make) -> None:
    overlaps = []
    for strength in (0, 5):
        run = make("method=o_lora", f"method.orthogonality={strength}", "train.lr=1e-2")
        run.learn(0)
        run.learn(1)
        overlaps.append(run.method.overlap().item())
    assert overlaps[1] < 0.5 * overlaps[0]


# SAPT


def test_sapt_weights_and_divergence() -> None:
    """Oracle 7, with the newest branch last: scores [.5, .5, .75], and KL of the stored [.7, .3, 0]."""
    found = sapt.scores(double([[1, 2, 0, -1]]), double([[1, 0, 0, 0], [0, 1, 0, 1], [0.5, 0.5, 0, 0]]))
    assert found[0].tolist() == [0.5, 0.5, 0.75]
    assert found.softmax(1)[0].tolist() == pytest.approx([0.3045043424, 0.3045043424, 0.3909913152], abs=1e-10)
    assert sapt.divergence(double([0.7, 0.3]), found).item() == pytest.approx(0.578205629, abs=1e-9)


def test_sapt_keeps_inputs_and_mean_weights(make) -> None:
    """Two percent of a task, at least one; weights over the branches there were; old router rows get their term."""
    run = make("method=sapt", "method.share=0.2")
    for index in range(3):
        run.learn(index)
    method = run.method
    assert [len(rows) for rows in method.memory.values()] == [4, 4, 4]
    assert all(set(run.data.train.tasks[rows]) == {task} for task, rows in method.memory.items())
    assert [len(mean) for mean in method.means] == [1, 2, 3]
    assert all(mean.sum().item() == pytest.approx(1, abs=1e-6) for mean in method.means)
    batch = run.data.train.batch(run.data.train.rows_of(2)[:4])
    extra = method.loss(batch) - method.mixed_loss(batch, method.route(batch))
    by_hand = 0.0
    for task in range(2):
        weights = method.route(run.data.train.batch(method.memory[task])).double()
        target = torch.nn.functional.pad(method.means[task], (0, 2 - task)).double()
        by_hand += torch.xlogy(target, target / weights).sum(1).mean().item()
    assert extra.item() == pytest.approx(0.5 * by_hand, rel=1e-3, abs=1e-6)


def test_a_stratified_share_has_every_label() -> None:
    """Oracle 2: sizes of the SuperNI tasks; 14 labels fit into 20 places, 1000 different targets do not."""
    rng = np.random.default_rng(0)

    def kept(count: int, labels: int) -> np.ndarray:
        return stratified(np.arange(count) % labels, np.arange(count), 0.02, rng)

    assert len(kept(1000, 14)) == 20
    assert set(kept(1000, 14) % 14) == set(range(14))
    assert set(kept(250, 3) % 3) == {0, 1, 2}
    sizes = {1000: 20, 250: 5, 160: 3, 126: 2, 338: 6, 142: 2, 975: 19, 10: 1}
    assert {count: len(kept(count, count)) for count in sizes} == sizes
    assert len(stratified(np.zeros(9), np.arange(9), 0.0, rng)) == 0


# MoCL


def test_mocl_weights_and_matching(make) -> None:
    """Oracle 13: softmax of 8 c, or c itself; the task given leaves out later modules."""
    cosines = double([[0.9, 0.5]])
    method = mocl.MoCL()
    assert method.weigh(cosines)[0].tolist() == pytest.approx([0.9608342772, 0.0391657228], abs=1e-10)
    assert method.weigh(cosines, torch.tensor([0]))[0].tolist() == [1.0, 0.0]
    direct = mocl.MoCL(compose=mocl.Compose.direct)
    assert direct.weigh(cosines)[0].tolist() == [0.9, 0.5]
    assert direct.weigh(cosines, torch.tensor([0]))[0].tolist() == [0.9, 0.0]
    run = make("method=mocl")
    run.learn(0)
    run.learn(1)
    batch = run.data.train.batch(run.data.train.rows_of(1)[:4])
    run.method.cosines = lambda queries: cosines.float().expand(len(queries), 2)
    found = run.method.loss(batch) - run.method.mixed_loss(batch, run.method.weigh(cosines.float().expand(4, 2)))
    assert found.item() == pytest.approx(0.5, abs=1e-6)


def test_mocl_query_of_a_train_row_is_that_of_the_bare_backbone(make) -> None:
    """What was computed once before the task equals what it is afterwards, whatever the branches learned."""
    run = make("method=mocl", "train.lr=1e-2")
    for index in range(2):
        run.learn(index)
    rows = run.data.train.rows_of(1)[:5]
    again = run.method.query(run.data.train.batch(rows))
    assert torch.allclose(run.method.queries[run.method.place[rows]], again, atol=1e-5)


# Routers see one example at a time


@pytest.mark.parametrize("name", ROUTED)
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(name: str, make) -> None:
    """Nor on padding: texts of different lengths, each alone and all together."""
    run = make(f"method={name}", "train.lr=1e-2")
    for index in range(2):
        run.learn(index)
    rows = np.arange(12)
    assert len(set(run.data.test.lengths[rows])) > 1
    alone = torch.cat([scores(run, rows[i : i + 1]) for i in range(12)])
    assert torch.allclose(scores(run, rows), alone, atol=1e-4)


# InfLoRA and GainLoRA


def test_projected_rows() -> None:
    """Oracle 9: no part along e1, norm 1 / sqrt(3)."""
    a, basis = double([[1, 1, 0], [0, 2, 2]]), double([[1], [0], [0]])
    found = projected(a, basis)
    assert found.tolist() == [
        pytest.approx([0, 0.57735027, 0], abs=1e-8),
        pytest.approx([0, 0.40824829, 0.40824829], abs=1e-8),
    ]
    assert (found @ basis).abs().max().item() == 0


@pytest.mark.parametrize(("epsilon", "count"), [(0.5, 1), (0.9, 1), (0.995, 2)])
def test_first_basis(epsilon: float, count: int) -> None:
    """Oracle 10: cumulative shares .642, .928, .9993, 1 of sigma = 3, 2, 1, .1: those below epsilon, at least one."""
    found = extended(torch.empty(4, 0, dtype=torch.float64), torch.diag(double([3, 2, 1, 0.1])), epsilon)
    assert found.shape == (4, count)
    assert torch.allclose(found.T @ found, torch.eye(count, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("epsilon", "added"), [(0.75, 0), (0.9, 1), (0.97, 2), (0.995, 3)])
def test_basis_growth(epsilon: float, added: int) -> None:
    """Oracle 10: e1 explains .753 of diag(4, 2, 1, .5); directions are added while the share is below epsilon."""
    e1 = double([[1], [0], [0], [0]])
    found = extended(e1, torch.diag(double([4, 2, 1, 0.5])), epsilon)
    assert torch.equal(found[:, :1], e1)
    assert torch.allclose(found.abs(), torch.eye(4, dtype=torch.float64)[:, : 1 + added], atol=1e-12)


def test_threshold_grows_with_the_tasks() -> None:
    found = [threshold(0.995, index, 15) for index in (0, 1, 7, 14)]
    assert found == pytest.approx([0.995, 0.99533333, 0.99733333, 0.99966667], abs=1e-8)


@pytest.mark.parametrize("design", ["random", "svd"])
@pytest.mark.parametrize("name", ["inf_lora", "gain_lora"])
def test_new_branches_do_not_read_old_directions(name: str, design: str, make) -> None:
    """Oracle 9 on trained layers: inside span(M) the new branch gives 0; M stays orthonormal; only B has moved."""
    run = make(f"method={name}", f"method.design={design}", "train.lr=1e-2", "method.epsilon=0.9")
    method = run.method
    run.learn(0)
    old = {key: basis.clone() for key, basis in method.bases.items()}
    run.learn(1)
    for key, layer in method.increments.layers.items():
        basis = old[method.same[key]]
        x = torch.randn(20, basis.shape[1]) @ basis.T
        assert layer.b.abs().max() > 1e-4
        assert product(x, layer.a.detach(), layer.b.detach(), None).abs().max() < 1e-5
        assert layer.a.grad is None
        norms = layer.a.norm(dim=1)
        assert torch.allclose(norms, torch.full_like(norms, 3**-0.5), atol=1e-4)
    for key, basis in method.bases.items():
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5), key
        assert basis.shape[1] >= old[key].shape[1]
        assert torch.equal(basis[:, : old[key].shape[1]], old[key])


def test_layers_that_read_the_same_input_share_a_basis(make) -> None:
    """Query and value of an attention; svd gives them the same rows; layers of different depth have their own."""
    run = make("method=inf_lora", "method.design=svd")
    run.learn(0)
    method = run.method
    assert len(method.increments.layers) == 4
    assert len(method.bases) == 2
    pairs = [[layer for key, layer in method.increments.layers.items() if f"layer.{i}." in key] for i in range(2)]
    assert all(torch.equal(query.a, value.a) for query, value in pairs)
    assert not torch.equal(pairs[0][0].a, pairs[1][0].a)


def test_covariances_leave_out_padding(make) -> None:
    """C over padded batches equals the mean over the rows one by one."""
    run = make("method=inf_lora")
    method = run.method
    method.increments.add(0)
    method.grow_head(0)
    whole, _ = method.covariances(0)
    method.objective.eval_batch_size = 1
    alone, _ = method.covariances(0)
    assert all(torch.allclose(whole[key], alone[key], atol=1e-5) for key in whole)


def test_gate_opening() -> None:
    """Oracle 8."""
    found = gain_lora.opening(double([0, 0.25, -0.5, 1]))
    assert found.tolist() == pytest.approx([0, 0.4621171573, 0.7615941560, 0.9640275801], abs=1e-10)


def test_gate_step_leaves_old_inputs_alone() -> None:
    """Oracle 11: without rescaling dW x = 0 for x in span(M); with it each row has the plain step's norm."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))[0]
    before, step = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    after = gain_lora.projected_step(before, before + step, basis, rescale=False)
    x = basis @ double([0.3, -2])
    assert torch.allclose((after - before) @ x, double([0, 0, 0]), atol=1e-12)
    assert not torch.allclose(after, before)
    rescaled = gain_lora.projected_step(before, before + step, basis, rescale=True)
    assert torch.allclose(rescaled.norm(dim=1), (before + step).norm(dim=1))
    assert torch.allclose(nn.functional.normalize(rescaled), nn.functional.normalize(after))


def test_gates_of_old_tasks_keep_their_bits(make) -> None:
    """Oracle 11, over training: the new gate starts from the old one and moves only outside of its bases."""
    run = make("method=gain_lora", "method.rescale=false", "method.epsilon=0.9", "train.lr=1e-2")
    method = run.method
    run.learn(0)
    old = {name: tensor.clone() for name, tensor in method.gates[0].state_dict().items()}
    bases = {name: basis.clone() for name, basis in method.bases.items()}
    run.learn(1)
    assert all(torch.equal(old[name], tensor) for name, tensor in method.gates[0].state_dict().items())
    for name in ("down", "up"):
        moved = method.gates[1].get_parameter(name).detach() - old[name]
        assert moved.abs().max() > 1e-3
        assert (moved @ bases[gain_lora.READS[name]]).abs().max() < 1e-4
    assert (method.gates[1].key @ bases["gate"]).abs().max() < 1e-4


def test_parameters_of_a_gate() -> None:
    """Oracle 11: 205,824 at T5-large's width."""
    assert sum(p.numel() for p in gain_lora.Gate(1024, 100, 0).parameters()) == 205_824


# Prompts


def test_l2p_chooses_by_cosine() -> None:
    """Oracle 5."""
    keys = double([[1, 0, 0], [1, 1, 0], [0, 1, 0], [-1, 0, 0], [1, 1, 1]])
    cosines, chosen = l2p.nearest(double([[1, 0, 0]]), keys, 3)
    assert chosen.tolist() == [[0, 1, 4]]
    assert cosines[0].tolist() == pytest.approx([1, 0.70710678, 0.57735027], abs=1e-8)
    assert -0.5 * cosines.sum(1).mean().item() == pytest.approx(-1.1422285252, abs=1e-9)


def test_l2p_loss_and_input(make) -> None:
    """Keys start as the mean of their prompt; k L vectors stand before a text, in falling similarity."""
    run = make("method=l2p")
    method, batch = run.method, run.data.train.batch(run.data.train.rows_of(0)[:4])
    method.grow_head(0)
    assert torch.allclose(method.keys, method.prompts.mean(1))
    cosines, chosen = method.nearest(batch)
    embeds = method.objective.inputs(batch)["inputs_embeds"]
    assert embeds.shape[1] == 15 + batch.input_ids.shape[1]
    assert torch.equal(embeds[0, 5:10], method.prompts[chosen[0, 1]])
    plain = super(l2p.L2P, method).loss(batch)
    assert (method.loss(batch) - plain).item() == pytest.approx(-0.5 * cosines.sum(1).mean().item(), abs=1e-5)


def test_progressive_prompts_grow_and_stay(make) -> None:
    """Oracle 6: ten vectors more a task, newest first; the older ones keep their bits."""
    run = make("method=progressive_prompts", "train.lr=1e-2")
    method, batch = run.method, run.data.train.batch(np.arange(4))
    width = batch.input_ids.shape[1]
    kept: list[torch.Tensor] = []
    for index in range(3):
        run.learn(index)
        kept.append(method.new.detach().clone())
        embeds = method.objective.inputs(batch)["inputs_embeds"]
        assert embeds.shape[1] == 10 * (index + 1) + width
        assert torch.equal(embeds[0, :-width], torch.cat(kept[::-1]))


def test_text_is_cut_and_prompts_are_not(make) -> None:
    """Oracle 6: a model of 40 positions leaves 10 tokens beside three prompts; what frames the text stays."""
    run = make("method=progressive_prompts", "model.config.max_position_embeddings=40")
    pool, tokenizer = run.data.train, run.method.objective.tokenizer
    assert pool.lengths.max() == 10
    cut = [pool.tokens(row) for row in range(len(pool)) if pool.lengths[row] == 10]
    assert all((row[0], row[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) for row in cut)
    for index in range(3):
        run.learn(index)
    embeds = run.method.objective.inputs(pool.batch(np.arange(len(pool))))["inputs_embeds"]
    assert embeds.shape[1] == 40
    assert scores(run, np.arange(24)).isfinite().all()


@pytest.mark.parametrize("representation", ["cls", "last", "mean", "mask"])
def test_a_prompt_of_token_embeddings_reads_like_the_text_with_those_tokens(representation: str, make) -> None:
    """The position that is read moves with the prompt, and padding stays out."""
    template = ["benchmark.template='{text} {mask}'"] if representation == "mask" else []
    run = make("method=progressive_prompts", f"model.representation={representation}", *template)
    objective, pool = run.method.objective, run.data.train
    batch = pool.batch(np.flatnonzero(pool.lengths != pool.lengths.max())[:5])
    ids = torch.tensor([50, 60, 70])
    embedding = objective.adapters.model.get_input_embeddings()
    objective.prompt = lambda batch: embedding(ids).expand(len(batch), -1, -1)
    with torch.no_grad():
        found = objective.features(batch)
        longer = torch.cat([ids.expand(len(batch), 3), batch.input_ids], dim=1)
        mask = torch.cat([torch.ones(len(batch), 3, dtype=torch.long), batch.attention_mask], dim=1)
        hidden = objective.adapters.model(input_ids=longer, attention_mask=mask).last_hidden_state
    rows = torch.arange(len(batch))
    length = batch.attention_mask.sum(1)
    expected = {
        "cls": hidden[:, 3],
        "last": hidden[rows, 2 + length],
        "mask": hidden[rows, 3 + batch.positions],
        "mean": torch.stack([hidden[row, 3 : 3 + length[row]].mean(0) for row in rows]),
    }[representation]
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_task_given_shows_only_the_prompts_there_were(make) -> None:
    """What task 1 reads is bit for bit what it read right after it was learned."""
    run = make("method=progressive_prompts", "method.task_id_at_test=true", "train.lr=1e-2")
    method, pool = run.method, run.data.test
    run.learn(0)
    batch = pool.batch(pool.rows_of(0))
    seen = []
    with torch.inference_mode():
        before = method.objective.features(batch)
    run.learn(1)
    run.learn(2)
    with torch.inference_mode():
        method.objective.head.scatter = lambda h: seen.append(h) or h
        everything = pool.batch(np.arange(len(pool)))
        method.predict(everything, Choices(range(12), everything.tasks))
    assert len(seen) == 3
    assert torch.allclose(seen[0], before, atol=1e-6)


def test_the_reparametrisation_is_part_of_what_is_stored(make) -> None:
    run = make("method=progressive_prompts", "method.mlp=16")
    run.learn(0)
    shown = run.method.newest().detach()
    assert not torch.allclose(shown, run.method.new)
    run.learn(1)
    assert torch.equal(run.method.frozen[0], shown)
    twin = make("method=progressive_prompts", "method.mlp=16")
    twin.method.load_state_dict(run.method.state_dict())
    assert torch.equal(twin.method.prompt(run.data.test.batch([0])), run.method.prompt(run.data.test.batch([0])))
    assert torch.equal(scores(twin, np.arange(24)), scores(run, np.arange(24)))


@pytest.mark.parametrize("method", ["mocl", "progressive_prompts"])
def test_a_run_with_the_task_given_says_so(method: str, words: Path, clpet, tmp_path: Path) -> None:
    args = ["train", f"method={method}", "method.task_id_at_test=true", *tiny_args(words), "train.epochs=1"]
    assert clpet(*args).code == 0
    (path,) = tmp_path.glob("outputs/*/*/s*/results.json")
    assert json.loads(path.read_text())["task_id_at_test"] is True


# OSF


def test_osf_keeps_strong_directions_and_decomposes_anew(make) -> None:
    """A task hardly moves W between the strongest half of its singular directions; then the new W is decomposed."""
    run = make("method=osf", "train.lr=1e-2")
    method = run.method
    first = {name: weight.detach().clone() for name, weight in method.weights().items()}
    assert len(first) == 4
    run.learn(0)
    changes = {name: layer.get_delta_weight("default").detach() for name, layer in method.layers().items()}
    run.learn(1)
    for name, weight in method.weights().items():
        assert torch.allclose(weight, first[name] + changes[name], atol=1e-6)
        u, _, v = torch.linalg.svd(first[name])
        assert changes[name].abs().max() > 1e-4
        kept = u[:, :16].T @ changes[name] @ v[:16].T
        assert kept.norm() < 0.1 * changes[name].norm()  # of a random change it would have half the norm
    assert method.objective.adapters.names == ["default"]


# EWC and LwF in the forms that other papers use


def test_ewc_penalty_around_the_newest_weights(make) -> None:
    """Oracle 3: theta = [1, 2], theta* = [.5, 2.5], F = [2, 4], lambda = 400: 300 and [400, -800]."""
    method = make("method=ewc", "method.strength=400", "method.merge=average").method
    theta, star, fisher = nn.Parameter(torch.tensor([1.0, 2.0])), double([0.5, 2.5]), double([2, 4])
    method.named = lambda: {"x": theta}
    method.quadratic = {"x": (fisher, fisher * star, fisher * star.square())}
    method.prepare(0)
    method.penalty().backward()
    assert method.penalty().item() == pytest.approx(300, rel=1e-5)
    assert theta.grad.tolist() == pytest.approx([400, -800], rel=1e-5)


@pytest.mark.parametrize(("kind", "expected"), [("sample", [5, 2]), ("batch", [4, 1])])
def test_fisher_of_examples_and_of_batches(kind: str, expected: list[float], make, monkeypatch) -> None:
    """Oracle 3: gradients [1, 2] and [3, 0] squared one by one, or their mean squared."""
    method = make("method=ewc", f"method.fisher={kind}").method
    theta, gradients = nn.Parameter(torch.zeros(2)), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    method.named = lambda: {"x": theta}
    monkeypatch.setattr(method.data.train, "rows_of", lambda *tasks: np.array([0, 1]))
    monkeypatch.setattr(Static, "loss", lambda self, batch: (gradients[batch.rows] @ theta).mean())
    assert method.information(0)["x"].tolist() == expected


def test_merged_fisher() -> None:
    """Oracle 3: averages [3, 3] and [3, 2], sum [9, 6], decayed [7.95, 5.22]."""
    found = {}
    for how in (Merge.average, Merge.sum, Merge.decay):
        total, steps = double([5, 2]), []
        for count, new in enumerate(([1, 4], [3, 0]), 1):
            total = merged(total, double(new), count, how, 0.9)
            steps.append(total.tolist())
        found[how] = steps
    assert found[Merge.average] == [[3, 3], [3, 2]]
    assert found[Merge.sum][1] == [9, 6]
    assert found[Merge.decay][1] == pytest.approx([7.95, 5.22])


@pytest.mark.parametrize("merge", ["average", "sum", "decay"])
def test_merged_ewc_is_centred_on_the_newest_weights(merge: str, make) -> None:
    """After a task the penalty is zero at its weights, and rows of labels to come are free."""
    run = make("method=ewc", f"method.merge={merge}", "method.fisher=batch", "method.strength=100")
    run.learn(0)
    run.learn(1)
    run.method.prepare(2)
    assert run.method.penalty().item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        run.method.objective.head.weight[8:] += 5
    assert run.method.penalty().item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        run.method.objective.head.weight[:4] += 5
    assert run.method.penalty().item() > 1e-3


def test_lwf_divergence() -> None:
    """Oracle 4: KL(old || new) at T = 2 times 4, never the reverse (2.2436); zero for equal logits."""
    old, new = double([[3, 0, -2]]), double([[0, 1, 0]])
    assert lwf.divergence(old, new, 2).item() == pytest.approx(2.1155131044, abs=1e-9)
    assert lwf.divergence(old, new, 1).item() == pytest.approx(1.2760785078, abs=1e-9)
    assert lwf.divergence(old.repeat(3, 1), new.repeat(3, 1), 2).item() == pytest.approx(2.1155131044, abs=1e-9)
    assert lwf.divergence(old, old, 2).item() == pytest.approx(0, abs=1e-12)
    grads = []
    for form in (lwf.divergence, lwf.distillation):
        z = new.clone().requires_grad_()
        form(old, z, 2).backward()
        grads.append(z.grad)
    assert torch.allclose(*grads)


# All of them


@pytest.mark.parametrize("name", ["inc_lora", "o_lora", "sapt", "ewc", "lwf", "replay"])
def test_one_task_is_sequential_fine_tuning(name: str, make) -> None:
    """Oracle 15: from the same start, bit for bit; nothing of these methods acts before task 2."""
    seq, run = make("method=sequential"), make(f"method={name}")
    if name in INCREMENTS:
        increments, add = run.method.increments, run.method.increments.add
        start = {key: value.detach().clone() for key, value in seq.method.objective.adapters.tensors("default").items()}

        def add_the_same(seed: int) -> None:
            add(seed)
            for key, layer in increments.layers.items():
                with torch.no_grad():
                    layer.a.copy_(start[f"base_model.model.{key}.lora_A.weight"])

        increments.add = add_the_same
    seq.learn(0)
    run.learn(0)
    assert torch.equal(run.method.objective.head.weight, seq.method.objective.head.weight)
    assert torch.equal(scores(run, np.arange(24)), scores(seq, np.arange(24)))


@pytest.mark.parametrize("name", [*INCREMENTS, "l2p", "progressive_prompts", "osf", "ewc", "lwf"])
def test_micro_batches_add_up_to_the_same_gradient(name: str, make) -> None:
    """Oracle 16: 16 at once or 4 times 4, with every penalty, at random values of what starts from zero."""
    more = {"o_lora": ["method.decay=0.1"], "ewc": ["method.merge=average", "method.fisher=batch", "method.strength=100"],
            "lwf": ["method.reduction=mean", "method.temperature=2"]}.get(name, [])  # fmt: skip
    found = []
    for size in ("null", "4"):
        run = make(f"method={name}", f"hardware.micro_batch_size={size}", *more)
        run.learn(0)
        if name in INCREMENTS:
            add, layers = run.method.increments.add, run.method.increments.layers

            def add_filled(seed: int, add=add, layers=layers) -> None:
                add(seed)
                for layer in layers.values():
                    nn.init.normal_(layer.b, std=0.1, generator=torch.Generator().manual_seed(0))

            run.method.increments.add = add_filled
        run.trainer.trial = True
        run.trainer.begin_task(1)
        run.method.learn(run.benchmark.tasks[1], 1, run.trainer)
        found.append([parameter.grad for parameter in run.method.parameters()])
    assert all(grad is not None for grad in found[0])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("name", [*INCREMENTS, "l2p", "progressive_prompts", "osf"])
def test_a_state_gives_back_the_predictions(name: str, make) -> None:
    """Oracle 17, after two tasks, bit for bit."""
    run, twin = make(f"method={name}"), make(f"method={name}")
    for index in range(2):
        run.learn(index)
    twin.method.load_state_dict(run.method.state_dict())
    assert torch.equal(scores(twin, np.arange(24)), scores(run, np.arange(24)))
    assert twin.method.trainable_parameters() == run.method.trainable_parameters() or name in (
        "sapt",
        "mocl",
        "gain_lora",
    )


@pytest.mark.parametrize("name", INCREMENTS)
def test_earlier_branches_keep_their_bits(name: str, make) -> None:
    run = make(f"method={name}", "train.lr=1e-2")
    run.learn(0)
    first = run.method.increments.state()
    run.learn(1)
    for key, layer in run.method.increments.layers.items():
        assert torch.equal(layer.A, first[key]["A"])
        assert torch.equal(layer.B, first[key]["B"])
        assert first[key]["B"].abs().max() > 0
