"""SLM: what its increments compute, what a task may change, what a text retrieves."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clpet.config.seeding import derive
from clpet.errors import ConfigError, ModelError
from clpet.evaluation.evaluator import Evaluator
from clpet.models.adapters import Adapters, Frozen, Lora
from clpet.models.backbone import Backbone
from clpet.models.stacked_lora import Increments, attention_outputs
from clpet.objectives.base import Choices
from clpet.replay.batch_plan import BatchPlan
from tests.methods.test_all_methods import results
from tests.models.test_sentence_encoder import make_encoder
from tests.models.test_stacked_lora import IDS, network, read

OUTPUTS = {"bert": 2, "llama": 2, "t5": 6, "gpt2": 2}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"), size=48)


@pytest.fixture
def slm(make, encoder: Path):
    """A method set up on the words benchmark; `spread` puts texts around a point per task, so far apart."""

    def build(*overrides: str, spread: float | None = 10.0) -> SimpleNamespace:
        run = make("method=slm", f"method.encoder={encoder}", "train.lr=2e-2", "method.rank=4",
                   "method.groups=6", "method.keys=4", "method.top_k=4",
                   "method.stage1.min_steps=150", *overrides)  # fmt: skip
        if spread is not None:
            run.method.embeddings = Around(run, spread)
        run.evaluate = lambda learned: Evaluator(run.benchmark, run.data)(run.method, learned, [0, 1, 2])
        return run

    return build


class Around:
    """Embeddings drawn around a centre for each task, the same for the same text."""

    def __init__(self, run: SimpleNamespace, spread: float) -> None:
        centres = torch.randn(len(run.benchmark), 48, generator=torch.Generator().manual_seed(7)) * spread
        self.data, self.tables = run.data, {}
        for split in ("train", "validation", "test"):
            texts = [(i, e.text) for i, task in enumerate(run.benchmark.tasks) for e in task.split(split)]
            self.tables[split] = torch.stack([centres[task] + noise(text) for task, text in texts])

    def __call__(self, pool: object, rows: np.ndarray) -> torch.Tensor:
        split = next(split for split in self.tables if getattr(self.data, split) is pool)
        return self.tables[split][torch.from_numpy(rows)]


def noise(text: str) -> torch.Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(derive(0, text)))


def increments(model: nn.Module, targets: list[str] | None, r: int = 3) -> Increments:
    backbone = Backbone(name="any", path=".")
    lora = Lora(r=r, alpha=r, targets=targets or attention_outputs(model))
    return Increments(Adapters(model, backbone, Frozen()), lora.peft_config(backbone))


def filled(found: Increments, tasks: int, count: int, dtype: torch.dtype = torch.float32) -> Increments:
    for task in range(tasks):
        found.add(task, count, lambda b, generator: b.normal_(generator=generator))
        for layer in found.layers.values():
            new = torch.randn(layer.b.shape, generator=torch.Generator().manual_seed(task)) * 0.1
            layer.set(layer.A.to(dtype), layer.B.to(dtype), layer.a.detach().to(dtype), new.to(dtype))
    return found


# Increments


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_default_targets_are_the_output_projections_of_attention(kind: str) -> None:
    """Oracle 23: one layer per attention; in a T5 those of the encoder, the decoder and between the two."""
    found = increments(network(kind), None)
    assert len(found.layers) == OUTPUTS[kind]
    bare = read(found, IDS)
    found.add(0, 4)
    assert torch.equal(read(found, IDS), bare)  # oracle 1


def test_a_target_that_does_not_exist_lists_those_that_do() -> None:
    """Oracle 23."""
    with pytest.raises(ModelError, match=r"names the layer o_proj, .* available: dense, key, query, value"):
        increments(network("bert"), ["query", "o_proj"])


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("bert", None),
        ("bert", ["intermediate.dense"]),
        ("llama", ["k_proj", "o_proj", "down_proj"]),
        ("t5", ["o", "wi"]),
    ],
)
def test_factored_and_dense_increments_agree(
    kind: str, targets: list[str] | None, dtype: torch.dtype, most: float
) -> None:
    """Oracle 7: W + sum_i w_i A_i B_i for each text alone; also layers that are not square."""
    found = filled(increments(network(kind).to(dtype), targets), 2, 4, dtype)
    weights = torch.rand(3, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
    branches = torch.tensor([1, 4, 7])
    with torch.no_grad(), found.mixed(weights, branches):
        together = read(found, IDS)
    for row in range(3):
        for layer in found.layers.values():
            a, b = layer.all()
            delta = sum(
                w * b.view(-1, 8, 3)[:, i] @ a.view(8, 3, -1)[i] for w, i in zip(weights[row], branches, strict=True)
            )
            layer.kept = layer.module.weight.detach().clone()
            assert dtype is torch.float32 or torch.linalg.matrix_rank(delta) <= 9  # oracle 9
            layer.module.weight.data += delta
        with torch.no_grad(), found.off():
            dense = read(found, IDS[row : row + 1])
        for layer in found.layers.values():
            layer.module.weight.data = layer.kept
        with torch.no_grad(), found.mixed(weights[row : row + 1], branches):
            alone = read(found, IDS[row : row + 1])
        assert (together[row] - dense[0]).abs().max() <= most
        assert (together[row] - alone[0]).abs().max() <= most
    with torch.no_grad(), found.off():
        assert (read(found, IDS) - together).abs().max() > 0.01


def test_the_newest_values_alone_get_gradients() -> None:
    """`mixed` without branches reads the newest ones, as all branches with no weight on the others do."""
    found = filled(increments(network("llama"), None), 2, 2)
    weights = torch.rand(3, 2)
    with found.mixed(weights):
        new = read(found, IDS)
    with found.weighted(torch.cat([torch.zeros(3, 2), weights], 1)):
        assert torch.allclose(read(found, IDS), new, atol=1e-6)
    new.square().sum().backward()
    assert all(tensor.grad is not None for tensor in found.current().values())
    assert all(parameter.grad is None for parameter in found.adapters.model.parameters())
    with torch.no_grad():
        base, layer = read(found, IDS), next(iter(found.layers.values()))
        layer.b.mul_(2)  # oracle 9: twice a is twice the increment of a layer
    with found.mixed(weights), torch.no_grad():
        x = torch.randn(3, 4, 16)
        doubled = layer.forward(layer.module, (x,), torch.zeros(3, 4, 16))
        layer.b.div_(2)
        assert torch.allclose(doubled, 2 * layer.forward(layer.module, (x,), torch.zeros(3, 4, 16)), atol=1e-5)
    assert base.shape == new.shape


@pytest.mark.parametrize(
    ("shape", "rank", "value"),
    [(("bert", {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}), 12, 221_184),
     (("llama", {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}), 8, 2_097_152)],
)  # fmt: skip
def test_sizes_of_values(shape: tuple, rank: int, value: int) -> None:
    """Oracle 17: floats of one value; four of BERT's are 884,736, the 24 of LLaMA's groups 50,331,648."""
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(shape[0], **shape[1]))
        found = increments(model, None, rank)
        found.add(0, 4)
    assert found.count() == 4 * value
    assert 24 * 2_097_152 == 50_331_648


# Learning


def test_before_training_a_task_changes_nothing(slm) -> None:
    """Oracle 1: with its fresh values the model answers as the frozen backbone; stage 1 did not use it."""
    run = slm()
    batch = run.data.test.batch(np.arange(6))
    bare = run.method.objective.features(batch)
    run.trainer.settings.lr = 0.0
    run.learn(0)
    cost = run.method.objective.meter.take_learning()
    assert cost["forward_examples"] == 24 * run.config.train.epochs  # stage 2 alone
    used = torch.arange(4)
    with run.method.increments.mixed(torch.rand(6, 4), used), torch.no_grad():
        assert torch.equal(run.method.objective.features(batch), bare)


def test_no_gradient_crosses_the_stages(slm) -> None:
    """Oracle 6: stage 2 does not reach keys, stage 1 nothing but keys; the optimiser has the current task alone."""
    run, held = slm(), []
    original = run.trainer._optimizer
    run.trainer._optimizer = lambda parameters: held.append(list(parameters)) or original(parameters)
    run.learn(0)
    run.learn(1)
    method = run.method
    assert len(held) == 2
    current = [*method.increments.current().values(), *method.task_heads.heads[1].parameters()]
    assert {id(tensor) for tensor in held[1]} == {id(tensor) for tensor in current}
    for tensor in current:
        tensor.grad = None
    method.loss(run.data.train.batch(run.data.train.rows_of(1)[:6])).backward()
    assert all(keys.grad is None and not keys.requires_grad for keys in method.key_pool)
    assert all(
        p.grad is None
        for p in [*method.task_heads.heads[0].parameters(), *method.objective.adapters.model.parameters()]
    )
    assert any((tensor.grad != 0).any() for tensor in current)


def everything(method) -> dict[str, torch.Tensor]:
    """Keys, values and head rows by task."""
    found = {}
    for task, keys in enumerate(method.key_pool):
        found[f"{task} keys"] = keys.clone()
        rows = slice(task * method.per_task * method.rank, (task + 1) * method.per_task * method.rank)
        for name, layer in method.increments.state().items():
            found[f"{task} {name} A"], found[f"{task} {name} B"] = layer["A"][rows].clone(), layer["B"][:, rows].clone()
        for name, value in method.task_heads.heads[task].named_parameters():
            found[f"{task} head {name}"] = value.detach().clone()
    return found


@pytest.mark.parametrize("values", ["shared", "per_group"])
def test_earlier_tasks_keep_their_bits(values: str, slm) -> None:
    """Oracle 12, with weight decay: after each task keys, values and head rows of every earlier one are the same."""
    run = slm(f"method.values={values}", "method.top_k=2", "train.weight_decay=0.5", "benchmark.softmax=seen")
    before: dict[str, torch.Tensor] = {}
    for task in range(3):
        run.learn(task)
        after = everything(run.method)
        assert len(before) < len(after)
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), name
        assert all(tensor.abs().sum() > 0 for tensor in after.values())
        before = after


def test_later_tasks_leave_what_an_input_retrieved_as_it_was(slm) -> None:
    """Oracle 13: similarities to old keys and, with the same keys chosen, old logits are bit-identical alone."""
    run = slm("method.top_k=2")
    run.learn(0)
    pool, method = run.data.test, run.method
    batch = pool.batch(pool.rows_of(0)[:1])
    with torch.no_grad():
        sigma, before = method.similarities(batch, method.key_pool), method.predict(batch, Choices([0]))
    run.learn(1)
    run.learn(2)
    with torch.no_grad():
        assert torch.equal(method.similarities(batch, method.key_pool)[:, :, :4], sigma)
        after = method.predict(batch, Choices([0]))
        assert torch.equal(after.scores[:, :4], before.scores[:, :4])
        assert not torch.equal(after.scores[:, 4:], before.scores[:, 4:])  # their heads are there now
        mixed = pool.batch(np.concatenate([pool.rows_of(0)[:1], pool.rows_of(2)[:3]]))
        assert torch.allclose(method.predict(mixed, Choices([0])).scores[0], after.scores[0], atol=1e-6)


def test_tasks_can_be_learned_in_any_order(slm) -> None:
    """Oracle 14: keys, values and heads of a task are the same bits wherever it stands."""
    found = []
    for order in (["fruit", "metal", "river"], ["river", "fruit", "metal"]):
        run = slm("method.head=per_task", f"benchmark.order=[{','.join(order)}]", spread=None)
        pool = run.data.train
        run.method.plan = lambda index, pool=pool: BatchPlan(pool, 1, lambda epoch: [pool.rows_of(index)])
        for task in range(3):
            run.learn(task)
        pieces = everything(run.method)
        found.append({f"{order[int(key[0])]}{key[1:]}": value for key, value in pieces.items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


# Answering


def test_told_apart_tasks_are_not_forgotten(slm) -> None:
    """Oracle 16: every text finds its task's keys; among a task's labels what was right stays right."""
    run = slm("train.epochs=8", "method.stage1.min_steps=600")
    scores = []
    for task in range(3):
        run.learn(task)
        found = run.evaluate(task + 1)
        scores.append([found.own[i].value for i in range(3)])
        figures = run.method.diagnostics()
        names = run.benchmark.names[: task + 1]
        assert figures["right_picks"] == 100
        assert all(figures[f"vote/{name}"] == figures[f"picks/{name}"] == 100 for name in names)
        assert found.diagnostics["selector_average"] == 100
    assert scores[2][2] > 80
    assert min(scores[0][0], scores[1][1]) > 80
    assert scores[2][:2] == [scores[0][0], scores[1][1]]


def test_equal_tasks_are_not_told_apart_and_a_task_id_helps(slm) -> None:
    """Oracles 15 and 16: retrieval at chance costs accuracy; the same model given the task id does not lose it."""
    run = slm("train.epochs=8", spread=0.0)
    for task in range(3):
        run.learn(task)
    found = run.evaluate(3)
    assert run.method.diagnostics()["right_picks"] < 60
    seen, own = (np.mean([scores[i].value for i in range(3)]) for scores in (found.seen, found.own))
    assert own > seen + 10
    given = slm("train.epochs=8", "method.head=per_task", spread=0.0)
    for task in range(3):
        given.learn(task)
    told = given.evaluate(3)
    assert given.method.task_id_at_test
    assert np.mean([told.seen[i].value for i in range(3)]) >= seen
    assert given.method.diagnostics()["right_picks"] == 100
    assert told.seen == told.own


def test_the_known_task_s_view_is_the_task_s_own_keys(slm) -> None:
    """Texts that picked other keys are answered again; those that did not keep their scores."""
    run = slm("method.top_k=2", "method.stage1.min_steps=600", spread=0.5)
    for task in range(3):
        run.learn(task)
    method, pool = run.method, run.data.test
    batch = pool.batch(np.arange(len(pool)))
    with torch.no_grad():
        found = method.predict(batch, Choices(range(12)))
        known = method.predict_known_task(batch, found)
        own = method.predict_retrieved(batch, Choices([], batch.tasks))
    right = found.trace["right_picks"] == 1
    assert right.any()
    assert not right.all()
    assert torch.equal(known.scores[right], found.scores[right])
    labels = method.objective.own[batch.tasks] == 0
    assert torch.allclose(known.scores[labels], own.scores[labels], atol=1e-5)
    assert not torch.allclose(known.scores[labels], found.scores[labels], atol=1e-3)


def test_batch_mean_reads_one_task_at_a_time(slm) -> None:
    """Oracle 8: a batch of one text is that text; batches that are tested hold one task; mixed ones differ."""
    run = slm("method.retrieval=batch_mean", "method.top_k=2", spread=2.0)
    for task in range(3):
        run.learn(task)
    method, pool = run.method, run.data.test
    with torch.no_grad():
        single = method.predict(pool.batch([0]), Choices(range(12)))
        same = method.predict(pool.batch([0, 0, 0]), Choices(range(12)))
        assert torch.allclose(same.scores, single.scores.expand(3, -1), atol=1e-5)
        mixed = method.predict(pool.batch([0, int(pool.rows_of(2)[0])]), Choices(range(12)))
        assert not torch.allclose(mixed.scores[:1], single.scores, atol=1e-3)
    parts = method.batches(pool, np.arange(len(pool)))
    assert all(len(set(pool.tasks[part])) == 1 for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(pool)))


def test_a_text_does_not_depend_on_its_batch(slm) -> None:
    run = slm("method.values=per_group", "method.top_k=2", spread=0.5)
    for task in range(3):
        run.learn(task)
    pool = run.data.test
    with torch.no_grad():
        together = run.method.predict(pool.batch(np.arange(24)), Choices(range(12)))
        for row in range(0, 24, 5):
            alone = run.method.predict(pool.batch([row]), Choices(range(12)))
            assert torch.allclose(alone.scores[0], together.scores[row], atol=1e-5)
            assert alone.trace["right_picks"][0] == together.trace["right_picks"][row]


# Heads


def shared_labels(folder: Path) -> Path:
    """Three tasks; the second one's labels are all of the first one's."""
    folder.mkdir()
    lines = [f'{{"text": "{label} {label} {i}", "label": "{label}", "task": "{task}"}}\n'
             for task, labels in (("t1", "abc"), ("t2", "bc"), ("t3", "cd")) for label in labels for i in range(10)]  # fmt: skip
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


def test_the_head_grows_by_new_labels_alone(slm, tmp_path: Path) -> None:
    """Oracle 22: a task whose labels are all there trains no row; old columns do not depend on later tasks."""
    run = slm(f"data_dir={shared_labels(tmp_path / 'data')}", spread=None)
    method = run.method
    run.learn(0)
    h = torch.randn(2, method.objective.dim)
    before, rows = method.task_heads.scores(h, None), everything(method)
    assert method.task_heads.heads[0].labels == [0, 1, 2]
    run.learn(1)
    assert method.task_heads.heads[1].labels == []
    assert len(method.parameters()) == len(method.increments.current())
    assert torch.equal(method.task_heads.scores(h, None), before)
    run.learn(2)
    after = method.task_heads.scores(h, None)
    assert method.task_heads.heads[2].labels == [3]
    assert torch.equal(after[:, :3], before[:, :3])
    assert not torch.equal(after[:, 3], before[:, 3])
    assert all(torch.equal(everything(method)[name], value) for name, value in rows.items() if "head" in name)
    batch = run.data.train.batch(run.data.train.rows_of(2)[:4])
    logits = torch.cat([head(h) for head in method.task_heads.competing], 1)[:, method.task_heads.columns]
    assert logits.shape == (2, 2)  # the softmax is over c and d
    assert method.task_heads.place[batch.labels].min() >= 0


def test_a_head_per_task_has_all_of_its_rows(slm, tmp_path: Path) -> None:
    """SLM-TI: a label of two tasks has two rows, and the task id says which; others cannot be answered."""
    run = slm(f"data_dir={shared_labels(tmp_path / 'data')}", "method.head=per_task", spread=None)
    for task in range(3):
        run.learn(task)
    heads = run.method.task_heads.heads
    assert [head.labels for head in heads] == [[0, 1, 2], [1, 2], [2, 3]]
    h = torch.randn(2, run.method.objective.dim)
    found = run.method.task_heads.scores(h, torch.tensor([0, 2]))
    assert torch.allclose(found[0, :3], heads[0](h)[0])
    assert torch.allclose(found[1, 2:], heads[2](h)[1])
    assert found[0, 3] == found[1, 0] == float("-inf")


# Text to text


@pytest.mark.parametrize("model", ["tiny_t5", "tiny_llama"])
@pytest.mark.parametrize("decode", ["generate", "rank"])
def test_answers_in_a_batch_are_those_alone(model: str, decode: str, slm) -> None:
    """The mixture of a prompt holds for all tokens of its answer and for all its candidates."""
    run = slm(f"model={model}", "benchmark.objective=text_to_text", "benchmark.max_target=6", "method.values=per_group",
              "method.top_k=2", f"evaluation.decode={decode}", "train.epochs=1", spread=0.5)  # fmt: skip
    for task in range(3):
        run.learn(task)
    method, pool = run.method, run.data.test
    with torch.no_grad():
        for value in method.increments.current().values():
            value.normal_(generator=torch.Generator().manual_seed(3))
    rows = pool.rows_of(1)
    with torch.inference_mode():
        together = method.predict(pool.batch(rows), Choices(range(12)))
        alone = [method.predict(pool.batch([row]), Choices(range(12))).texts[0] for row in rows]
    assert together.texts == alone
    with method.increments.off(), torch.inference_mode():
        bare = method.objective.predict(pool.batch(rows), Choices(range(12))).texts
    assert decode == "rank" or bare != alone


@pytest.mark.parametrize("model", ["tiny_t5", "tiny_llama"])
def test_text_to_text_learns_with_its_own_values(model: str, slm) -> None:
    run = slm(f"model={model}", "benchmark.objective=text_to_text", "train.epochs=6", "benchmark.max_target=8")
    pool = run.data.train
    batch = pool.batch(pool.rows_of(0))
    start = run.method.objective.loss(batch).item()
    run.learn(0)
    assert run.method.loss(batch).item() < start - 0.1
    assert not hasattr(run.method.objective, "head")
    run.learn(1)
    assert run.evaluate(2).seen[0].total == 8


# Cost


class Peak(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self.alive:
                    self.alive.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key: int, size: int) -> None:
        if key in self.alive:
            self.alive.remove(key)
            self.now -= size


def test_a_training_step_costs_no_more_memory_with_twenty_tasks(slm) -> None:
    """Beside the stored factors: no activation, gradient or optimiser state of an earlier task."""
    run = slm(spread=None)
    method, batch = run.method, run.data.train.batch(run.data.train.rows_of(0)[:16])
    method.embeddings = lambda pool, rows: torch.randn(len(rows), 48)
    peaks = []
    for task in range(20):
        method.key_pool.append(torch.randn(6, 4, 8))
        method.increments.add(task, method.per_task)
        if task == 0:
            method.task_heads.grow([0, 1, 2, 3], seen=False)
        if task in (0, 19):
            with Peak() as peak:
                optimizer = torch.optim.AdamW(method.parameters())
                method.loss(batch).backward()
                optimizer.step()
            peaks.append(peak.peak)
    assert peaks[0] > 10_000
    assert peaks[1] <= peaks[0]
    assert method.increments.count() == 20 * 4 * 4 * (32 + 32) * 2


# Records and refusals


def test_a_run_keeps_and_shows_what_was_retrieved(words: Path, encoder: Path, clpet, tmp_path: Path) -> None:
    """results.json, the parquet and the picture; a second run finds its embeddings and gets the same."""
    from tests.conftest import tiny_args

    sizes = ["method.groups=6", "method.keys=4", "method.top_k=4"]
    args = ["train", "method=slm", f"method.encoder={encoder}", *sizes, *tiny_args(words), "fresh=true"]
    assert clpet(*args).code == 0
    first, cache = results(tmp_path / "outputs"), sorted(tmp_path.glob("outputs/.cache/embeddings/*/*"))
    stamps = [path.stat().st_mtime_ns for path in cache]
    figures = first["diagnostics"][-1]
    (folder,) = tmp_path.glob("outputs/*/slm/s*")
    table = pyarrow.parquet.read_table(folder / "predictions" / "after-003.parquet")
    for name in ("fruit", "metal", "river"):
        rows = [row for row in table.to_pylist() if row["task"] == name]
        assert figures[f"vote/{name}"] == pytest.approx(100 * np.mean([row["selected"] == name for row in rows]))
        assert figures[f"picks/{name}"] == pytest.approx(100 * np.mean([row["right_picks"] for row in rows]))
    assert (folder / "retrieval.png").stat().st_size > 5000
    assert len(list((folder / "adapters").iterdir())) == 3 * 4
    assert first["cost"][0]["stored_parameters"] == 4 * 12 * 64 * 2 + 6 * 4 * 8 + 4 * 33
    assert (first["softmax"], first["resolved"]) == ("task", {})
    assert len(cache) == 9  # train, validation and test of three tasks
    assert clpet(*args).code == 0
    assert [path.stat().st_mtime_ns for path in cache] == stamps
    assert results(tmp_path / "outputs")["scores"] == first["scores"]
    assert results(tmp_path / "outputs")["diagnostics"] == first["diagnostics"]


@pytest.mark.parametrize(
    ("override", "message"),
    [("method.top_k=5", "method.top_k must be from 1 to method.keys=4"),
     ("method.stage1.top_k=5", "method.stage1.top_k must be from 1 to method.keys=4"),
     ("method.groups=7", "method.groups=7 must be a divisor of 48"),
     ("method.keys=9", "method.keys=9 must be at most 8"),
     ("method.values=both", "method.values must be shared or per_group, not both"),
     ("method.rank=0", "method.rank must be at least 1"),
     ("peft=lora", "method=slm needs peft=frozen"),
     ("method.encoder=nli_mpnet_base", "is not on this machine"),
     ("method.targets=[nowhere]", "method.targets names the layer nowhere")],
)  # fmt: skip
def test_senseless_settings_are_refused(override: str, message: str, slm) -> None:
    with pytest.raises((ConfigError, ModelError)) as found:
        slm(override, spread=None)
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_sizes_follow_the_labels_of_a_task_unless_they_are_set(make, encoder: Path) -> None:
    """One group, at least 20 keys and the best one where there are labels; options that are set stay; all is said."""
    run = make("method=slm", f"method.encoder={encoder}")
    assert run.method.sizes == (1, 20, 1)
    assert run.method.resolved(run.benchmark) == {"method.groups": 1, "method.keys": 20, "method.top_k": 1}
    run.learn(0)
    assert run.method.key_pool[0].shape == (1, 20, 48)
    chosen = make("method=slm", f"method.encoder={encoder}", "method.groups=4", "method.keys=6").method
    assert chosen.sizes == (4, 6, 1)
    assert chosen.resolved(run.benchmark) == {"method.top_k": 1}
    plain = SimpleNamespace(tasks=[SimpleNamespace(labels=())])
    assert chosen.choose_sizes(plain) == (4, 6, 4)
    many = SimpleNamespace(tasks=[SimpleNamespace(labels=range(5)), SimpleNamespace(labels=range(30))])
    assert run.method.choose_sizes(many) == (1, 60, 1)
