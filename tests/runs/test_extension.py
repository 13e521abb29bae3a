"""A finished run learns one more task: it ends bit for bit like a run that learns all tasks itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

import clpet as api
from clpet.config.build import parse_config
from clpet.config.compose import compose_config
from clpet.errors import ConfigError, DataError
from clpet.methods.base import Method
from clpet.runs.carry_over import CarryOver
from clpet.runs.extension import kept_states
from clpet.runs.extension_words import with_settings_of_run
from clpet.training.trainer import Trainer
from clpet.wiring import Components
from tests.conftest import domain_args, methods_of, run_cli, tiny_args, words_of, write_words

TWO, THREE = "tasks=[fruit,metal]", "tasks=[fruit,metal,river]"
TIMES = (
    "seconds",
    "peak_memory_mb",
    "evaluation_memory_mb",
    "evaluation_seconds",
    "cached_examples",
    "evaluated_examples",
)
SAME = ("tasks", "scores", "correct", "total", "task_scores", "backward", "metrics", "task_metrics", "diagnostics",
        "test_sets", "parameters")  # fmt: skip


def read(run: Path) -> dict[str, Any]:
    """results.json of a run."""
    return json.loads((run / "results.json").read_text())


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or steps.jsonl, without rates and costs; methods that train nothing have no steps."""
    values = [json.loads(line) for line in (run / name).read_text().splitlines()] if (run / name).is_file() else []
    return [
        {k: v for k, v in line.items() if k != "cost" and "_per_s" not in k and k != "memory_gb"} for line in values
    ]


# Methods whose state has rows for labels to come, so that its size after a task depends on their number.
SIZED_BY_LABELS = ("crl", "slm")


def assert_same(whole: Path, extended: Path) -> None:
    """Results, costs, logs, predictions and all written weights are equal bit for bit."""
    one, two = read(whole), read(extended)
    for key in SAME:
        assert one[key] == two[key], key
    for before, after in zip(one["cost"], two["cost"], strict=True):
        left_out = {*TIMES, *(["stored_bytes"] if one["method"] in SIZED_BY_LABELS else [])}
        assert {k: v for k, v in before.items() if k not in left_out} == {
            k: v for k, v in after.items() if k not in left_out
        }
    for name in ("metrics.jsonl", "steps.jsonl"):
        assert lines(whole, name) == lines(extended, name)
    newest = max(path.name for path in (whole / "state").iterdir())
    for pattern in ("adapters/**/*.safetensors", "heads/*.safetensors", f"state/{newest}/*.safetensors"):
        files = sorted(path.relative_to(whole) for path in whole.glob(pattern))
        assert files == sorted(path.relative_to(extended) for path in extended.glob(pattern))
        for file in files:
            a, b = load_file(whole / file), load_file(extended / file)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a), file
    for file in sorted(whole.glob("predictions/*.parquet")):
        ours = pyarrow.parquet.read_table(extended / file.relative_to(whole))
        assert pyarrow.parquet.read_table(file).equals(ours), file.name


def train(folder: Path, *words: str, data: Path) -> Path:
    """Trains on the words benchmark, with the method and options given as words."""
    return api.train(*tiny_args(data), *words, f"output_dir={folder}", quiet=True).path


@pytest.fixture(scope="module")
def two(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sequential run on the first two tasks; read only."""
    return train(tmp_path_factory.mktemp("two"), "method=sequential", TWO, data=words)


@pytest.fixture
def base(two: Path, tmp_path: Path) -> Path:
    """A copy of that run in an output folder of its own."""
    return Path(shutil.copytree(two, tmp_path / "outputs" / Path(*two.parts[-3:])))


def test_the_same_command_with_one_more_task_learns_this_task_only(
    base: Path, finished: Path, words: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Both rows before the third task are measured again, since they have a cell of it now."""
    learned, begin = [], Trainer.begin_task
    monkeypatch.setattr(
        Trainer, "begin_task", lambda self, index, last=False: learned.append(index) or begin(self, index, last)
    )
    out = api.train(*tiny_args(words), "method=sequential", THREE, f"output_dir={base.parents[2]}").path
    assert learned == [2]
    assert f"extends {base}: fruit, metal not learned again (state/002)" in capsys.readouterr().out
    assert_same(finished, out)
    record = {"run": str(base), "tasks": ["fruit", "metal"], "state": "state/002", "copied_rows": []}
    assert read(out)["extended_from"] == json.loads((out / "run.json").read_text())["extended_from"] == record


def test_a_run_that_was_killed_in_the_new_task_resumes_in_it(
    base: Path, finished: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extended run has a state of its own from the start: the one that it extends may be gone by then."""
    step = Trainer._step

    def killed(self: Trainer, plan: Any, hooks: Any, clip: Any, fit: Any, *rest: Any) -> None:
        if fit.epoch == 1:
            raise RuntimeError("killed")
        step(self, plan, hooks, clip, fit, *rest)

    call = [*tiny_args(words), "method=sequential", THREE, "train.save_minutes=1e-9", f"output_dir={base.parents[2]}"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", killed)
        with pytest.raises(RuntimeError):
            api.train(*call, quiet=True)
    shutil.rmtree(base)
    out = api.train(*call, quiet=True).path
    assert_same(finished, out)
    assert read(out)["extended_from"]["tasks"] == ["fruit", "metal"]


def test_a_named_run_gives_its_settings(base: Path) -> None:
    """The option that the line has itself, and where files are written, are not taken from the run."""
    words = with_settings_of_run([f"extend={base}", "benchmark.tasks=[fruit,metal,river]", "hardware.threads=2"])
    assert words[-3:] == [f"extend={base}", "benchmark.tasks=[fruit,metal,river]", "hardware.threads=2"]
    assert {"method=sequential", "model=tiny", "train.epochs=2", f"output_dir={base.parents[2]}"} <= set(words)
    assert not {"hardware.threads=1", "benchmark.tasks=[fruit,metal]"} & set(words)


def test_words_of_a_run_that_could_harm_are_left_out(base: Path) -> None:
    """Somebody else's run.json names neither folders to write to nor values from the environment."""
    run_json = json.loads((base / "run.json").read_text())
    evil = ["hydra.run.dir=/x", "+hydra.job.env_set.A=1", "output_dir=/x", "cache_dir=/x", "~method", "data_dir=${oc.env:HOME}",
            "model.trust_remote_code=true", "tracking.entity=me", "tracking.notes='a\n${oc.env:HOME}'", "method=ewc"]  # fmt: skip
    (base / "run.json").write_text(json.dumps({**run_json, "overrides": evil}))
    words = with_settings_of_run([f"extend={base}", "benchmark.tasks=[fruit]"])
    assert words == ["method=ewc", f"output_dir={base.parents[2]}", f"extend={base}", "benchmark.tasks=[fruit]"]


def test_a_neighbour_that_is_damaged_or_has_a_copy_of_a_state_does_not_stop_a_run(base: Path) -> None:
    (base / "checkpoints" / "after-old").mkdir(parents=True)
    assert set(kept_states(base)) == {1, 2}
    run_json = json.loads((base / "run.json").read_text())
    (base / "run.json").write_text(json.dumps({**run_json, "overrides": None}))
    with pytest.raises(DataError, match="its overrides are not a list"):
        with_settings_of_run([f"extend={base}", "benchmark.tasks=[fruit]"])


def test_links_of_a_run_are_not_followed_when_its_states_are_copied(base: Path, tmp_path: Path) -> None:
    state = base / "checkpoints" / "after-001" / "state"
    state.mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (state / "link").symlink_to(tmp_path / "secret")
    (state / "state.json").write_text("{}")
    assert CarryOver(base, ["fruit"]).copy_snapshot(tmp_path / "out", 1)
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["state.json"]


REFUSALS = {
    "settings": ([THREE, "train.lr=0.1"], "only the tasks may differ, but train.lr was 0.001, now 0.1"),
    "method": ([THREE, "method=joint"], "method.name was 'sequential', now 'joint'"),
    "seed": ([THREE, "seed=1"], "but seed was 0, now 1"),
    "order": (["tasks=[metal,fruit,river]"], "its first task is fruit, which is not the first one here"),
    "nothing new": (["tasks=[fruit]"], "there is no task after fruit"),
    "no tasks": ([], "needs the tasks of both runs: tasks=[old, ..., new]"),
    "two runs": ([THREE, "extend=a,b"], "extend=RUN names one run"),
    "no state": (["tasks=[fruit,river,metal]", "fewer"], "it has kept no state after 1 of its 2 tasks"),
    "no row": ([THREE, "fewer"], "row 1 of the matrix needs the weights after 1 of its tasks"),
    "unfinished": ([THREE, "unfinished"], "it is not finished; its own command resumes it"),
}


LONG = {"method", "seed", "order", "nothing new", "unfinished"}  # in the slow tests


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in LONG)) for case in REFUSALS])
def test_what_cannot_be_extended_is_refused_with_the_reason(case: str, base: Path) -> None:
    words, reason = REFUSALS[case]
    if "fewer" in words:
        shutil.rmtree(base / "state" / "001")
    if "unfinished" in words:
        (base / "results.json").unlink()
    words = [word for word in words if "=" in word]
    with pytest.raises(ConfigError) as error:
        api.train(f"extend={base}", *words, quiet=True)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("label", "task fruit has other data (train 24, now 26, test 8, now 9, labels 4, now 5)"),
        pytest.param("rows", "(train 24, now 25): new examples or labels can be a new task", marks=pytest.mark.slow),
        pytest.param("text", "(the same numbers, other texts or targets)", marks=pytest.mark.slow),
    ],
)
def test_other_data_of_an_old_task_are_refused(change: str, reason: str, base: Path, tmp_path: Path) -> None:
    """New rows, a new label, or another text in a task that the run has learned."""
    data = write_words(tmp_path / "data")
    file, row = data / "train.jsonl", {"text": "apple again", "label": "apple", "task": "fruit"}
    old = file.read_text()
    if change == "text":
        file.write_text(old.replace("apple n0", "apple n77", 1))
    elif change == "rows":
        file.write_text(old + json.dumps(row) + "\n")
    else:
        new = json.dumps({"text": "kiwi", "label": "kiwi", "task": "fruit"}) + "\n"
        file.write_text(old + 2 * new)
        (data / "test.jsonl").write_text((data / "test.jsonl").read_text() + new)
    with pytest.raises(ConfigError) as error:
        api.train(f"extend={base}", THREE, f"data_dir={data}", quiet=True)
    assert reason in str(error.value)


@pytest.mark.parametrize("extend", [True, False])
def test_a_dry_run_says_what_would_be_reused(
    extend: bool, base: Path, words: Path, capsys: pytest.CaptureFixture
) -> None:
    """With extend=off nothing is."""
    settings = [f"extend={base}"] if extend else [*tiny_args(words), "method=sequential", "extend=off"]
    assert run_cli("train", *settings, THREE, f"output_dir={base.parents[2]}", "dry_run=true") == 0
    assert (f"extends {base}: fruit, metal not learned again" in capsys.readouterr().out) == extend
    assert [path.name for path in base.parent.iterdir()] == [base.name]


SLOW = {
    "slm": ["method.stage1.min_steps=50"],
    "inf_lora": ["method.planned_tasks=3"],
    "gain_lora": ["method.planned_tasks=3"],
}
TEXT = ["objective=text_to_text", "benchmark.max_target=8", "train.epochs=1"]
VARIANTS = {
    **{name: [*words_of(name), *SLOW.get(name, [])] for name in methods_of("classification") if name != "joint"},
    "best epoch": ["method=replay", "replay=reservoir", "train.select=best"],
    "carried moments": ["method=sequential", "train.optimizer_state=carry", "train.schedule=ar"],
    "whole model": ["method=sequential", "peft=none", "train.lr=1e-4"],
    "answers": ["method=kif", *TEXT, "model=tiny_llama"],
    "ranked answers": ["method=sapt", *TEXT, "model=tiny_t5", "evaluation.decode=rank"],
}


MEASURED_AGAIN = ("replay", "dynamic_conpet", "crl", "slm", "answers", "whole model", "best epoch")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_learns_a_further_task_as_if_it_had_learned_all(variant: str, words: Path, tmp_path: Path) -> None:
    """With a matrix of the tasks seen so far, rows are copied; otherwise they are measured again."""
    args = ["train.lr=2e-2", *VARIANTS[variant]]
    full = [
        "evaluation.matrix=full"
        if variant in ("replay", "dynamic_conpet", "crl", "slm", "answers")
        else "evaluation.matrix=seen"
    ]
    whole = train(tmp_path / "whole", *args, *full, THREE, data=words)
    train(tmp_path / "grown", *args, *full, TWO, data=words)
    extended = train(tmp_path / "grown", *args, *full, THREE, data=words)
    assert read(extended)["extended_from"]["tasks"] == ["fruit", "metal"]
    assert_same(whole, extended)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dapt", "ewc"])
def test_a_further_domain_of_plain_text(method: str, prose: Path, tmp_path: Path) -> None:
    args = domain_args(prose, f"method={method}", "evaluation.max_tokens=500")
    tasks = ["benchmark.domains=[birds,metals]", "benchmark.domains=[birds,metals,tides]"]
    whole = api.train(*args, tasks[1], f"output_dir={tmp_path}/whole", quiet=True).path
    api.train(*args, tasks[0], f"output_dir={tmp_path}/grown", quiet=True)
    extended = api.train(*args, tasks[1], f"output_dir={tmp_path}/grown", quiet=True).path
    assert read(extended)["extended_from"]["tasks"] == ["birds", "metals"]
    assert_same(whole, extended)


@pytest.mark.slow
def test_a_shorter_common_prefix_continues_from_a_snapshot(words: Path, tmp_path: Path) -> None:
    """[fruit, river] is continued after fruit, where train.snapshot_every has kept the state; its row 1 is copied.

    The next extension takes row 1 from the snapshot, which the run has taken over.
    """
    args = ["method=ewc", "train.snapshot_every=1", "evaluation.matrix=seen"]
    base = train(tmp_path / "grown", *args, "tasks=[fruit,river,metal]", data=words)
    shutil.rmtree(base / "state" / "002")
    extended = train(tmp_path / "grown", *args, TWO, data=words)
    assert read(extended)["extended_from"]["state"] == "checkpoints/after-001/state"
    assert_same(train(tmp_path / "whole", *args, TWO, data=words), extended)
    assert (extended / "checkpoints" / "after-001" / "heads" / "default.safetensors").is_file()
    again = train(tmp_path / "grown", *args, THREE, data=words)
    assert read(again)["extended_from"] == {
        "run": str(extended), "tasks": ["fruit", "metal"], "state": "state/002", "copied_rows": [0, 1, 2]
    }  # fmt: skip
    assert_same(train(tmp_path / "whole", *args, THREE, data=words), again)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_two_ranks_extend_a_run(base: Path, finished: Path) -> None:
    """A run of one process is extended by one of two: up to rounding it ends like a run of one process."""
    assert run_cli("train", f"extend={base}", THREE, "hardware.ranks=2") == 0
    (extended,) = (path.parent for path in base.parent.glob("*/results.json") if path.parent != base)
    assert read(extended)["extended_from"]["tasks"] == ["fruit", "metal"]
    one, two = (load_file(run / "heads" / "default.safetensors") for run in (finished, extended))
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["method=joint"], "it learns all tasks at once"),
        (["method=inf_lora"], "its threshold depends on the number of tasks; method.planned_tasks=N fixes that number"),
        (["method=replay", "method.future_labels=true"], "trains the labels of all tasks from the start"),
        (["method=dynamic_conpet", "method.top_k=2"], "with method.top_k=2 it has learned no selector of its 2 tasks"),
        (["method=dynamic_conpet", "method.top_k=3"], "rounded together with those of all later labels"),
    ],
)
def test_methods_that_depend_on_the_number_of_tasks_say_so(options: list[str], reason: str) -> None:
    assert reason in method_of(*options).tied_to_later_tasks(2, 2, 3)


def test_a_selector_that_every_run_learns_alike_ties_nothing() -> None:
    """After one task there is no trained selector yet; with one module per text a run of two tasks has one."""
    method = method_of("method=dynamic_conpet", "method.top_k=1")
    assert not any(method.tied_to_later_tasks(*counts) for counts in ((1, 1, 3), (2, 2, 3), (2, 3, 4)))


def method_of(*options: str) -> Method:
    """The method of a configuration, not set up."""
    return Components.build(parse_config(compose_config(list(options)))).method
