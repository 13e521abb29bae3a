"""Methods of a user, each one file and one YAML in a folder of their own: stored logits and task arithmetic."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import set_up, tiny_args

PLUGINS = Path(__file__).parent / "plugins"
NAMES = ("stored_logits", "task_arithmetic")


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both methods, copied to a folder outside the project; one folder, since Python keeps imported modules."""
    return Path(shutil.copytree(PLUGINS, tmp_path_factory.mktemp("extension") / "mine"))


def results(folder: Path) -> dict:
    """What the only run below a folder wrote."""
    (file,) = folder.glob("outputs/*/*/*/results.json")
    return json.loads(file.read_text())


def set_up_plugin(monkeypatch: pytest.MonkeyPatch, plugins: Path, words: Path, name: str, *more: str):
    """A plug-in method ready to learn."""
    from clpet.config.compose import add_plugin_dir

    monkeypatch.setenv("CLPET_CONFIG_DIR", "")
    add_plugin_dir(str(plugins))
    search = f"hydra.searchpath=[file://{plugins}]"
    return set_up(tiny_args(words, "cache_dir=null", search, f"method={name}", *more))


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_one_short_file_and_one_yaml(name: str, plugins: Path, clpet, words: Path, tmp_path: Path) -> None:
    assert len((plugins / f"{name}.py").read_text().splitlines()) < 70
    answer = clpet("train", "--config-dir", plugins, f"method={name}", *tiny_args(words))
    assert answer.code == 0, answer.err
    assert results(tmp_path)["method"] == name


@pytest.mark.slow
def test_stored_logits_take_as_many_forward_passes_with_micro_batches_as_without(
    plugins: Path, clpet, words: Path, tmp_path
) -> None:
    """The stored logits are compared in the forward pass that also gives the cross-entropy."""
    counts = []
    for size in ("null", "4"):
        folder = tmp_path / size
        args = ["method=stored_logits", f"hardware.micro_batch_size={size}", f"output_dir={folder / 'outputs'}"]
        assert clpet("train", "--config-dir", plugins, *tiny_args(words), *args).code == 0
        counts.append([cost["forward_examples"] for cost in results(folder)["cost"]])
    assert counts[0] == counts[1]


def test_stored_logits_add_their_distance(plugins: Path, clpet, words: Path, monkeypatch) -> None:
    """With alpha the loss grows by alpha times the mean square over the labels that were stored."""
    run = set_up_plugin(monkeypatch, plugins, words, "stored_logits")
    run.learn(0)
    method, rows = run.method, run.method.replay.memory_rows()[:3]
    batch = run.data.train.batch(rows)
    with torch.no_grad():
        logits = method.logits(batch)
        assert torch.allclose(method.logits_stored[rows, : logits.shape[1]], logits, atol=1e-5)
        method.logits_stored[rows, : logits.shape[1]] += 2.0
        from clpet.training.step import StepContext

        loss = method.loss(StepContext.of(batch))
        assert loss - method.objective.loss(batch) == pytest.approx(0.5 * 4.0, abs=1e-4)


def test_task_arithmetic_adds_task_vectors(plugins: Path, clpet, words: Path, monkeypatch) -> None:
    """theta = theta_0 + scale (tau_1 + tau_2), and the second task starts from theta_0."""
    run = set_up_plugin(monkeypatch, plugins, words, "task_arithmetic", "method.scale=0.25")
    method, vectors, starts = run.method, [], []
    fit = method.fit

    def spy(trainer, index: int) -> None:
        starts.append({name: value.detach().clone() for name, value in method.adapter().items()})
        fit(trainer, index)
        vectors.append({name: value.detach() - method.start[name] for name, value in method.adapter().items()})

    method.fit = spy
    for index in range(2):
        run.learn(index)
    assert all(torch.equal(starts[1][name], method.start[name]) for name in method.start)
    for name, value in method.adapter().items():
        expected = method.start[name] + 0.25 * (vectors[0][name] + vectors[1][name])
        assert np.allclose(value.detach(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "attribute"), [("stored_logits", "logits_stored"), ("task_arithmetic", "sum_of_vectors")]
)
def test_listed_attributes_are_saved_and_restored(
    name, attribute, plugins: Path, clpet, words: Path, monkeypatch
) -> None:
    """Without a line of code for it: `saved` lists them."""
    run, fresh = (set_up_plugin(monkeypatch, plugins, words, name) for _ in range(2))
    run.learn(0)
    fresh.method.grow_head(0)
    fresh.method.load_state_dict(run.method.state_dict())
    values, restored = getattr(run.method, attribute), getattr(fresh.method, attribute)
    pairs = zip(values.values(), restored.values(), strict=True) if isinstance(values, dict) else [(values, restored)]
    assert all(torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)) for a, b in pairs)
