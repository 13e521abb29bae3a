"""Runs opened again: kept checkpoints, `clpet eval` and `clpet export`, and that a directory from elsewhere is only data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open

from clpet.errors import ClpetError
from clpet.runs.load_run import recorded
from clpet.runtime.run_checkpoint import read_tree, write_tree
from tests.conftest import domain_args, guarded, tiny_args


def only(pattern: str = "outputs/*/*/s*") -> Path:
    (folder,) = Path().glob(pattern)
    return folder


@pytest.fixture(scope="module")
def finished(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sequential run on the words benchmark that kept every second task."""
    out = tmp_path_factory.mktemp("runs")
    assert guarded("train", "method=sequential", *tiny_args(words), "train.keep=2", f"output_dir={out}") == 0
    (folder,) = out.glob("*/*/s*")
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def edit(run: Path, change: Callable[[dict[str, Any]], object], name: str = "run.json") -> None:
    value = json.loads((run / name).read_text())
    change(value)
    (run / name).write_text(json.dumps(value))


def refused(found: Any) -> bool:
    return (
        found.code == 2 and found.err.count("\n") == 1 and "Traceback" not in found.err and "internal" not in found.err
    )


# Kept checkpoints


def test_a_kept_checkpoint_is_what_adapters_would_hold_then(clpet, words: Path) -> None:
    """That after the last task equals adapters/ and heads/, byte for byte; others are of their time."""
    assert clpet("train", "method=sequential", *tiny_args(words), "train.keep=1").code == 0
    run = only()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["after-001", "after-002", "after-003"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        last = (run / "checkpoints" / "after-003" / "default" / name).read_bytes()
        assert last == (run / "adapters" / "default" / name).read_bytes()
    for row, labels in ((1, 4), (2, 8), (3, 12)):
        with safe_open(run / "checkpoints" / f"after-{row:03d}" / "heads" / "default.safetensors", "pt") as head:
            assert head.get_tensor("weight").shape[0] == labels
    assert not list(run.glob("checkpoints/.*"))


def test_keeping_changes_neither_result_nor_directory(clpet, words: Path, finished: Path) -> None:
    assert clpet("train", "method=sequential", *tiny_args(words)).code == 0
    assert only().name == finished.name
    assert (
        json.loads((only() / "results.json").read_text())["scores"]
        == json.loads((finished / "results.json").read_text())["scores"]
    )
    assert not (only() / "checkpoints").exists()
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["after-002"]


def test_keep_is_a_count(clpet, words: Path) -> None:
    assert "train.keep must be 0" in clpet("train", *tiny_args(words), "train.keep=-1").err


# clpet eval


@pytest.mark.parametrize("method", ["dynamic_conpet", "joint", "o_lora", "crl", "ea_emr", "sapt", "independent"])
def test_every_row_that_is_kept_is_measured_again_to_the_bit(method: str, clpet, words: Path) -> None:
    replay = ["replay=fixed"] if method in ("crl", "ea_emr") else []
    assert clpet("train", f"method={method}", *tiny_args(words), "train.keep=1", *replay).code == 0
    for after in [["--after", "3"], []] if method == "joint" else [["--after", "1"], ["--after", "2"], []]:
        found = clpet("eval", only(), *after)
        assert found.code == 0, found.err + found.out
        assert found.out.count("equal") == 3
        assert f"after {after[1] if after else 3} of 3 tasks" in found.out


@pytest.mark.parametrize("peft_option", ["none", "lora"])
def test_perplexities_are_measured_again_to_the_bit(peft_option: str, clpet, prose: Path) -> None:
    """With peft=none the whole model is kept once, as transformers reads it."""
    assert clpet("train", "method=sequential", *domain_args(prose, f"peft={peft_option}", "train.keep=2")).code == 0
    for after in (["--after", "0"], ["--after", "2"], []):
        found = clpet("eval", only(), *after)
        assert found.code == 0, found.err + found.out
        assert found.out.count("equal") == 3
    if peft_option == "none":
        kept = only() / "checkpoints" / "after-002"
        whole = (kept / "model" / "model.safetensors").stat().st_size
        assert (kept / "state" / "tensors.safetensors").stat().st_size < whole / 10


def test_another_score_than_the_recorded_one_is_said(clpet, run: Path) -> None:
    edit(run, lambda value: value["scores"][3].__setitem__(1, 14.0), "results.json")
    found = clpet("eval", run)
    assert found.code == 1
    assert found.out.count("equal") == 2
    assert "differs by -1.5" in found.out


def test_an_unfinished_run_is_compared_with_its_checkpoint(clpet, run: Path) -> None:
    (run / "results.json").unlink()
    assert clpet("eval", run, "--after", "2").out.count("equal") == 3
    shutil.rmtree(run / "state")
    assert clpet("eval", run).out.count("not recorded") == 3


@pytest.mark.parametrize(
    ("words_", "message"),
    [(["--after", "1"], "keeps no weights after 1 tasks, but after 0, 2, 3"), (["--after", "-1"], "keeps no weights"),
     (["--limit", "3"], "are for --downstream"), (["--here", "train.lr=2"], "only what may lie elsewhere"),
     (["--here", "data_dir=nowhere"], "is not a folder"), (["--config-dir", "."], "needs --allow-plugins"),
     (["--downstream", "arc_easy"], "this run's objective is classification")],
)  # fmt: skip
def test_eval_refuses(words_: list[str], message: str, clpet, run: Path) -> None:
    found = clpet("eval", run, *words_)
    assert refused(found)
    assert message in found.err


def test_other_data_are_refused(clpet, run: Path, words: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(words, tmp_path / "other"))
    assert clpet("eval", run, "--here", f"data_dir={other}").code == 0
    with (other / "test.jsonl").open("a") as file:
        file.write(json.dumps({"text": "fig fig", "label": "fig", "task": "fruit"}) + "\n")
    found = clpet("eval", run, "--here", f"data_dir={other}")
    assert refused(found)
    assert "were others" in found.err


# A directory from elsewhere


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(node: Any) -> None:
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return change


MALICIOUS = {
    "a class from elsewhere": (put("config", "method", "_target_", value="subprocess.Popen"), "no part of clpet"),
    "a class in a list": (put("config", "benchmark", "x", value=[{"_target_": "os.system"}]), "no part of clpet"),
    "a module that is like clpet": (put("config", "method", "_target_", value="clpet_evil.X"), "no part of clpet"),
    "a path as class": (put("config", "method", "_target_", value="clpet./tmp/x"), "no part of clpet"),
    "a class of another kind": (put("config", "method", "_target_", value="clpet.runs.tracking.Tracking"), "is no Method"),
    "an interpolation": (put("config", "model", "hub", value="${oc.env:HOME}"), "holds ${...}"),
    "a folder as hub id": (put("config", "model", "hub", value="../../etc"), "no hub id"),
    "an absolute hub id": (put("config", "model", "hub", value="/etc"), "no hub id"),
    "a package with a path": (put("config", "model", "package", value="os.path"), "model.package must be"),
    "a kernel from the hub": (put("config", "model", "attention", value="evil/kernel"), "model.attention must be"),
    "a task that leaves its folder": (put("config", "benchmark", "tasks", value=["../../x"]), "does not name a folder"),
    "a task of control signs": (put("tasks", value=["a\x00", "b", "c"]), "no name of a task"),
    "an encoder that leaves its folder": (put("config", "method", "encoder", value="../../x"), "no name, hub id"),
    "a method's name that is a path": (put("config", "method", "name", value=".."), "method.name must be"),
    "no config": (put("config", value=[]), "is not of the type dict"),
    "a group that is a number": (put("config", "replay", value=3), "replay must be"),
    "a group that is missing": (lambda value: value["config"].pop("peft"), "peft"),
    "a knob of another type": (put("config", "train", "epochs", value={"a": 1}), "train"),
    "an unknown knob": (put("config", "evil", value=1), "unknown key evil"),
    "a model that cannot be": (put("config", "model", "config", "hidden_size", value="wide"), "cannot be"),
    "a nest": (put("config", "x", value=json.loads("[" * 50 + "]" * 50)), "nested too deeply"),
    "a number that is none": (put("config", "train", "lr", value=float("nan")), "NaN"),
    "a number without end": (put("config", "train", "lr", value=float("inf")), "Infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_run_from_elsewhere_is_data(name: str, clpet, run: Path) -> None:
    change, message = MALICIOUS[name]
    edit(run, change)
    for words in (["eval", run], ["export", run, "exported", "--merge"]):
        found = clpet(*words)
        assert refused(found), found.err
        assert message in found.err
    assert not Path("exported").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"a": ' * 5000, "3", "\xff", '{"config": 1e999}', "9" * 6000]
)
def test_what_is_no_json_is_refused(text: str, clpet, run: Path) -> None:
    for name, command in (("run.json", "eval"), ("results.json", "show")):
        (run / name).write_bytes(text.encode("latin-1"))
        assert refused(clpet(command, run))


def test_remote_code_is_off_unless_plugins_are_allowed(run: Path) -> None:
    edit(run, put("config", "model", "trust_remote_code", value=True))
    assert recorded(run).parts["model"].trust_remote_code is False
    assert recorded(run, plugins=True).parts["model"].trust_remote_code is True


def test_own_classes_only_with_the_flag(clpet, run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "clpet_mine.py").write_text(
        "from dataclasses import dataclass\nfrom pathlib import Path\nfrom clpet.methods.sequential import Sequential\n\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n\n@dataclass\nclass Mine(Sequential):\n    pass\n"
    )
    edit(run, put("config", "method", "_target_", value="clpet_mine.Mine"))
    assert refused(clpet("eval", run))
    assert refused(clpet("eval", run, "--allow-plugins"))
    assert not (tmp_path / "ran").exists()
    found = clpet("eval", run, "--allow-plugins", "--config-dir", mine)
    assert found.code == 0, found.err
    assert (tmp_path / "ran").exists()


def damage(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A checkpoint with a right checksum and wrong contents."""
    tree = read_tree(run / "state" / "003")
    change(tree)
    write_tree(run / "state" / "003", tree)


@pytest.mark.parametrize(
    "change",
    [put("method", "objective", "adapters", value={"../../../evil": {}}), put("method", value=[]),
     put("method", "objective", "head", value={"labels": [99], "weight": "x"}), put("method", "objective", "adapters", value=3),
     put("method", "objective", "adapters", "default", value={"x": torch.zeros(1)}), lambda tree: tree.pop("method")],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(change: Callable[[dict[str, Any]], object], clpet, run: Path) -> None:
    damage(run, change)
    assert refused(clpet("eval", run))
    assert refused(clpet("export", run, "exported", "--merge"))
    assert not list(Path().glob("**/evil*"))


def test_a_damaged_checkpoint_is_said(clpet, run: Path) -> None:
    (run / "state" / "003" / "tensors.safetensors").write_bytes(b"pickle")
    found = clpet("eval", run)
    assert refused(found)
    assert "is damaged" in found.err


def test_an_adapter_s_name_is_no_path(make) -> None:
    with pytest.raises(ClpetError, match="no name of an adapter"):
        make("method=sequential").method.objective.adapters.add("../x", 0)


# clpet export


def hidden(model: Any, batch: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state


def test_a_merged_export_needs_nothing_of_clpet(clpet, run: Path, make) -> None:
    """transformers alone reads it; it gives what the backbone with the exported adapter gives."""
    found = clpet("export", run, "merged", "--merge", "--after", "2")
    assert found.code == 0, found.err
    about = json.loads(Path("merged/clpet.json").read_text())
    assert about["load"] == "transformers.AutoModel.from_pretrained(FOLDER)"
    assert about["tasks"] == ["fruit", "metal"]
    assert about["representation"] == "mean"
    model, tokenizer = (
        transformers.AutoModel.from_pretrained("merged"),
        transformers.AutoTokenizer.from_pretrained("merged"),
    )
    assert tokenizer("fig")["input_ids"] == make("method=sequential").method.objective.tokenizer("fig")["input_ids"]
    batch = make("method=sequential").data.test.batch([0, 1, 2])
    base = make("method=o_lora").method.objective.adapters.model  # the same backbone, bare
    theirs = peft.PeftModel.from_pretrained(base, run / "checkpoints" / "after-002" / "default").eval()
    assert torch.allclose(hidden(model.eval(), batch), hidden(theirs, batch), atol=1e-5)
    with safe_open("merged/heads/default.safetensors", "pt") as head:
        assert len(json.loads(head.metadata()["labels"])) == head.get_tensor("weight").shape[0] == 8


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_branches_are_added_to_the_weights(model: str, clpet, prose: Path) -> None:
    """A merged O-LoRA has the perplexities of the run, in layers stored either way round."""
    args = domain_args(prose, f"model={model}", "method=o_lora", "peft=lora")
    assert clpet("train", *args).code == 0
    run = only()
    assert clpet("export", run, "merged", "--merge").code == 0
    assert clpet("train", *args, "method=sequential", "model=local", "model.path=merged", "peft=none", "train.lr=0",
                 "output_dir=again").code == 0  # fmt: skip
    again = json.loads((only("again/*/*/s*") / "results.json").read_text())["scores"][0]
    assert again == pytest.approx(json.loads((run / "results.json").read_text())["scores"][3], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "peft_option"), [("osf", "osf"), ("sequential", "ia3"), ("sequential", "prompt"), ("l2p", "frozen")]
)
def test_every_way_of_training_is_exported_as_it_can_be(
    method: str, peft_option: str, clpet, prose: Path, words: Path
) -> None:
    args = domain_args(prose, f"method={method}", f"peft={peft_option}")
    if peft_option == "prompt":
        args = tiny_args(words, "method=sequential", "peft=prompt")
    done = clpet("train", *args)
    assert done.code == 0, done.err
    run = only()
    found = clpet("export", run, "merged", "--merge")
    if peft_option in ("osf", "ia3"):
        assert found.code == 0, found.err
        again = domain_args(prose, "method=sequential", "model=local", "model.path=merged", "peft=none", "train.lr=0")
        assert clpet("train", *again, "output_dir=again").code == 0
        scores = json.loads((only("again/*/*/s*") / "results.json").read_text())["scores"][0]
        assert scores == pytest.approx(json.loads((run / "results.json").read_text())["scores"][3], rel=1e-3)
    else:
        assert refused(found)
        assert "--merge" in found.err


def test_adapters_and_whole_models_are_exported_as_they_are(clpet, words: Path, prose: Path) -> None:
    assert clpet("train", "method=sequential", *domain_args(prose, "peft=none")).code == 0
    assert clpet("export", only(), "whole").code == 0
    assert json.loads(Path("whole/clpet.json").read_text())["what"] == "the whole model"
    args = tiny_args(words, "model=local", "model.path=backbone", "output_dir=second", "model.targets=[q_proj,v_proj]")
    shutil.copytree("whole", "backbone")
    assert clpet("train", "method=dynamic_conpet", *args).code == 0
    run = only("second/*/*/s*")
    assert clpet("export", run, "adapters").code == 0
    assert sorted(path.name for path in Path("adapters/adapters").iterdir()) == [
        "selector",
        "task000",
        "task001",
        "task002",
    ]
    base = transformers.AutoModel.from_pretrained("backbone")
    assert peft.PeftModel.from_pretrained(base, "adapters/adapters/task001").active_adapters == ["default"]
    assert sorted(path.stem for path in Path("adapters/heads").iterdir()) == [
        "selector",
        "task000",
        "task001",
        "task002",
    ]
    found = clpet("export", run, "merged", "--merge")
    assert refused(found)
    assert "chooses for each text" in found.err


def test_export_refuses(clpet, run: Path) -> None:
    found = clpet("export", run, "adapters")
    assert refused(found)
    assert "random weights" in found.err
    Path("full").mkdir()
    Path("full/mine.txt").touch()
    found = clpet("export", run, "full", "--merge")
    assert refused(found)
    assert "not empty" in found.err
    assert refused(clpet("export", "nowhere", "x"))
    assert refused(clpet("export", run, "x", "--merge", "--after", "7"))
