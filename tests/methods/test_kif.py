"""KIF as a method: when importance is scored, what is fused, and replay after the fusion."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clpet.config.build import build
from clpet.methods.base import Method
from clpet.methods.components.importance import Importance, norm
from clpet.methods.kif import KIF
from clpet.models.adapters import Adapters
from clpet.models.peft_options import FullFineTuning, Lora
from clpet.reporting.plots import method_figures
from tests.config.test_configs import compose_config
from tests.conftest import tiny_args


def weights(run) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in run.method.objective.adapters.tensors("default").items()}


def head(run) -> Tensor:
    return run.method.objective.head.weight.detach().clone()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def watch(run, monkeypatch: pytest.MonkeyPatch) -> list[Importance]:
    """Records the importance of each task when it ends."""
    recorded, consolidate = [], run.method.consolidate

    def record() -> Tensor:
        recorded.append(run.method.importance)
        return consolidate()

    monkeypatch.setattr(run.method, "consolidate", record)
    return recorded


def one_weight(value: list[float], **options) -> tuple[KIF, Tensor]:
    """KIF with `value` as its only scored tensor; with beta = 0 the running score is that of the last step."""
    method = KIF(**{"score": "first", "skip_first_step": False, "beta1": 0.0, "beta2": 0.0, **options})
    weight = nn.Parameter(torch.tensor(value, dtype=torch.float64))
    method.live = {"w": weight}
    method.importance = Importance(len(value), method.score, method.beta1, method.beta2, False, weight.detach())
    return method, weight


def step(method: KIF, weight: Tensor, gradient: list[float], lr: float, clip: float = 0.0) -> list[float]:
    """Does one step as the trainer does, and returns its scores."""
    weight.grad = torch.tensor(gradient, dtype=torch.float64)
    method.adjust_gradients(None)
    if clip:
        nn.utils.clip_grad_norm_([weight], clip)
    torch.optim.SGD([weight], lr).step()
    method.after_step(None)
    return method.importance.mean.tolist()


@pytest.mark.parametrize(("weight_at", "expected"), [("post_step", 0.975), ("pre_step", 1.0)])
def test_weights_from_after_or_before_the_step(weight_at: str, expected: float) -> None:
    assert step(*one_weight([2], weight_at=weight_at), [0.5], lr=0.1) == pytest.approx([expected])


@pytest.mark.parametrize(("gradient", "expected"), [("clipped", [0.6, 0.8]), ("raw", [3, 4])])
def test_gradients_after_or_before_clipping(gradient: str, expected: list[float]) -> None:
    assert step(*one_weight([1, 1], gradient=gradient), [3, 4], lr=0, clip=1) == pytest.approx(expected)


def test_weights_that_start_at_zero_have_no_importance_before_their_first_step() -> None:
    assert step(*one_weight([0], weight_at="pre_step"), [3], lr=0.1) == [0]
    assert step(*one_weight([0]), [3], lr=0.1)[0] > 0


def test_every_step_but_the_first_counts(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 examples in batches of 16 for 3 epochs are 6 steps; scores start from 0 in every task."""
    for skip, counted in (("true", 5), ("false", 6)):
        run = make("method=kif", "train.epochs=3", f"method.skip_first_step={skip}")
        recorded = watch(run, monkeypatch)
        run.learn(0)
        run.learn(1)
        assert [(importance.counted.item(), importance.steps) for importance in recorded] == [(counted, 6)] * 2
        assert run.method.diagnostics()["skipped_steps"] == 0


def test_the_first_task_is_that_of_sequential_training(make) -> None:
    run, plain = make("method=kif", "method.orth_strength=0"), make("method=sequential")
    run.learn(0)
    plain.learn(0)
    assert equal(weights(run), weights(plain))
    assert torch.equal(head(run), head(plain))


def test_the_first_importance_is_kept_as_it_is(make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make("method=kif")
    recorded = watch(run, monkeypatch)
    run.learn(0)
    (importance,) = recorded
    units = run.method.units
    scores = units.scores(dict(zip(run.method.live, _split(importance, run.method.live), strict=True)))
    assert torch.equal(units.join(run.method.accumulated), scores)
    assert scores.dtype is torch.float64
    assert len(scores) == 2 * 2 * 8  # layers, projections, ranks


def _split(importance: Importance, like: dict[str, Tensor]) -> list[Tensor]:
    slices = importance.elements().split([value.numel() for value in like.values()])
    return [values.view_as(value) for values, value in zip(slices, like.values(), strict=True)]


def test_no_fusion_is_sequential_training(make) -> None:
    run, plain = make("method=kif", "method.fusion=none", "method.orth_strength=0"), make("method=sequential")
    for index in range(3):
        run.learn(index)
        plain.learn(index)
    assert equal(weights(run), weights(plain))
    assert len(run.method.history) == 3


def pair(make, *options: str, fusion: str) -> SimpleNamespace:
    """Two tasks with and without fusion: weights before the second task, trained, and fused."""
    run, plain = (
        make("method=kif", *options, f"method.fusion={fusion}"),
        make("method=kif", *options, "method.fusion=none"),
    )
    run.learn(0)
    plain.learn(0)
    before, head_before, accumulated = weights(run), head(run), dict(run.method.accumulated)
    run.learn(1)
    plain.learn(1)
    return SimpleNamespace(
        run=run, plain=plain, before=before, new=weights(plain), fused=weights(run), accumulated=accumulated,
        head_before=head_before, head_new=head(plain), head=head(run),
    )  # fmt: skip


def test_adaptive_fusion_of_every_rank(make) -> None:
    """The weight of a rank applies to its row of A and its column of B; heads are not fused."""
    learned = pair(make, fusion="adaptive")
    units = learned.run.method.units
    old, new = norm(units.join(learned.accumulated)), units.join(learned.run.method.history[1]["importance"])
    weight = units.broadcast(torch.sigmoid((new - old) / 0.25))
    for name, w in weight.items():
        expected = w * learned.new[name] + (1 - w) * learned.before[name]
        torch.testing.assert_close(learned.fused[name], expected.float(), atol=1e-6, rtol=1e-5)
        assert not torch.allclose(learned.fused[name], learned.new[name])
    assert torch.equal(learned.head, learned.head_new)
    merged = norm(0.7 * old + 0.3 * new)
    torch.testing.assert_close(units.join(learned.run.method.accumulated), merged, atol=1e-6, rtol=1e-5)


def test_uniform_fusion_of_tensors_fuses_the_heads_old_rows_too(make) -> None:
    learned = pair(make, "method.unit=matrix", fusion="uniform")
    for name, value in learned.fused.items():
        torch.testing.assert_close(value, (learned.before[name] + learned.new[name]) / 2)
    old_rows = len(learned.head_before)
    torch.testing.assert_close(learned.head[:old_rows], (learned.head_before + learned.head_new[:old_rows]) / 2)
    assert torch.equal(learned.head[old_rows:], learned.head_new[old_rows:])
    assert len(learned.run.method.units.groups) == 2 * 2 * 2 + 2  # layers, projections, A and B; weight and bias


def test_uniform_is_adaptive_at_a_high_temperature(make) -> None:
    hot, uniform = make("method=kif", "method.tau=1e12"), make("method=kif", "method.fusion=uniform")
    for index in range(2):
        hot.learn(index)
        uniform.learn(index)
    for name, value in weights(hot).items():
        torch.testing.assert_close(value, weights(uniform)[name])


def test_micro_batches_give_the_same_scores(make) -> None:
    """With one batch of 8 or two of 4 the full batch's gradient is scored, and the orthogonality term counts once."""
    scores = []
    for size in ("null", "4"):
        run = make("method=kif", "train.global_batch_size=8", f"hardware.micro_batch_size={size}", "train.lr=1e-4")
        run.learn(0)
        scores.append(run.method.units.join(run.method.accumulated))
    torch.testing.assert_close(*scores, rtol=1e-3, atol=0)
    assert scores[0].max() > 0


def test_the_loss_holds_the_orthogonality_of_the_ranks(make) -> None:
    """Initially A is Kaiming and B is 0, so the term is about lambda sqrt(8) 5/6 = 0.2357."""
    terms = []
    for strength in (0.1, 0):
        run = make("method=kif", f"method.orth_strength={strength}")
        run.method.grow_head(0)
        run.method.start_importance()
        terms.append(run.method.step_loss(None))
    assert terms[0].item() == pytest.approx(0.2357, rel=0.1)
    assert terms[1] is None


def test_importance_belongs_to_the_chosen_epoch(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs have two steps, and the first step of all is skipped; scores are those of the best of 4 epochs."""
    for scores, counted in (
        ([0.1, 0.5, 0.9, 0.3, 0.2], 3),
        ([0.5, 0.1, 0.1, 0.1, 0.5], 0),
        ([0, 0.1, 0.2, 0.3, 0.4], 7),
    ):
        run = make("method=kif", "train.select=best", "train.epochs=4")
        values = iter(scores)
        monkeypatch.setattr(Method, "validate", lambda self, index, values=values: next(values))
        recorded = watch(run, monkeypatch)
        run.learn(0)
        assert recorded[0].counted.item() == counted


def test_replay_is_mixed_in_or_comes_after(make) -> None:
    for phase, old in (("union", True), ("after", False)):
        run = make("method=kif", "replay=share", "replay.share=0.5", f"method.replay_phase={phase}")
        run.learn(0)
        rows = np.concatenate(run.method.plan(1).epoch(0))
        assert (run.data.train.tasks[rows] == 0).any() == old
        assert list(run.method.stages(1)) == (["", "replay"] if phase == "after" else [""])


def test_replay_after_fusion_trains_old_units_alone(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """All other units stay unchanged bit for bit, even with weight decay."""
    run = make("method=kif", "replay=share", "replay.share=0.5", "method.replay_phase=after", "train.weight_decay=0.5")
    run.learn(0)
    fused, replay_protected = {}, run.method.replay_protected

    def record(trainer, index: int, protected: Tensor) -> None:
        fused.update(weights(run), protected=protected)
        replay_protected(trainer, index, protected)

    monkeypatch.setattr(run.method, "replay_protected", record)
    run.learn(1)
    protected = fused.pop("protected")
    assert protected.sum() == 7  # of 32, strictly above the percentile
    free = run.method.units.broadcast(protected)
    moved = [value != fused[name] for name, value in weights(run).items()]
    assert not any((change & ~mask).any() for change, mask in zip(moved, free.values(), strict=True))
    assert sum((change & mask).sum() for change, mask in zip(moved, free.values(), strict=True)) > 0


def test_tied_parameters_are_scored_once() -> None:
    """The embedding that T5's encoder, decoder and output share is one unit of full fine-tuning."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    backbone = build({**compose_config("model=t5_base").model}, "model")
    adapters = Adapters(model, backbone, FullFineTuning())
    adapters.add("default", 0)
    method = KIF(unit="matrix")
    head = nn.Linear(16, 2)
    method.objective = SimpleNamespace(adapters=adapters, parameters=lambda: dict(head.named_parameters()))
    scored = method.scored()
    assert len({value.data_ptr() for value in scored.values()}) == len(scored)
    assert sum(value.numel() for value in scored.values()) == model.num_parameters() + 16 * 2 + 2
    assert list(scored)[-2:] == ["head.0", "head.1"]


@pytest.mark.parametrize(
    ("model", "targets", "r", "expected", "matrices", "total"),
    [
        ("t5_large", ["q", "v"], 8, 2_359_296, 144, 740_027_392),
        ("t5_large", ["q", "v"], 4, 1_179_648, 144, None),
        ("flan_t5_large", ["q", "v"], 8, 2_359_296, 144, None),
        ("t5_base", ["q", "v"], 8, 884_736, 72, None),
        ("llama2_7b", ["q_proj", "v_proj"], 8, 4_194_304, 64, None),
        ("llama_7b", ["q_proj", "k_proj", "v_proj", "o_proj"], 8, 8_388_608, 128, None),
        ("llama2_13b", ["q_proj", "v_proj"], 8, 6_553_600, 80, None),
    ],
)
def test_trained_parameters_of_published_models(model, targets, r, expected, matrices, total) -> None:
    """Counted on the meta device: no weights are needed."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    backbone = build({**compose_config(f"model={model}").model}, "model")
    with torch.device("meta"):
        if backbone.architecture.value == "encoder_decoder":  # generation takes both halves
            values = dict(backbone.config)
            network = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
        else:
            network = backbone.skeleton()
        adapters = Adapters(network, backbone, Lora(r=r, targets=targets))
        adapters.add("default", 0)
    assert adapters.count("default") == expected
    assert len(adapters.tensors("default")) == 2 * matrices
    if total:
        assert sum(value.numel() for value in network.parameters()) == total


@pytest.mark.usefixtures("rendered")
def test_diagnostics_and_figures_of_a_run(words: Path, clpet, tmp_path: Path) -> None:
    result = clpet("train", "method=kif", *tiny_args(words))
    assert result.code == 0, result.err
    (path,) = (tmp_path / "outputs").glob("*/*/s*/results.json")
    rows = json.loads(path.read_text())["diagnostics"]
    assert set(rows[0]) == {"row"}
    assert rows[1]["skipped_steps"] == 0
    for row in rows[2:]:
        assert sum(row[f"units_{kind}"] for kind in ("kept", "shared", "taken", "averaged")) == pytest.approx(100)
        assert 0.018 <= row["new_weight_mean"] <= 0.982
        assert row["units_kept"] + row["units_shared"] == pytest.approx(100 * 7 / 32)  # n - 1 - floor(.8 (n - 1))
    for name in ("importance.png", "fusion.png"):
        assert (path.parent / name).stat().st_size > 5000


@pytest.mark.usefixtures("rendered")
def test_figures_are_drawn_from_a_loaded_state(make, tmp_path: Path) -> None:
    run, again = make("method=kif"), make("method=kif")
    run.learn(0)
    run.learn(1)
    again.method.load_state_dict(run.method.state_dict())
    paths = method_figures.draw(tmp_path, "kif", again.method.figures())
    assert [path.name for path in paths] == ["importance.png", "fusion.png"]
    assert all(path.stat().st_size > 5000 for path in paths)


def test_carved_validation_never_meets_the_test_set() -> None:
    """Best epochs are chosen on examples cut from train; no example is in two splits."""
    benchmark = build({**compose_config("benchmark=python_stdlib").benchmark}, "benchmark").load(None)
    for task in benchmark.tasks:
        splits = [{example.text for example in task.split(split)} for split in ("train", "validation", "test")]
        assert all(splits)
        assert not splits[0] & splits[1]
        assert not (splits[0] | splits[1]) & splits[2]
