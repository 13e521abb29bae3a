"""Opening run directories: snapshots, `clpet eval`, and run directories from untrusted sources."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from clpet.config.build import MOVED_CLASSES
from clpet.config.schema import OBJECT_GROUPS
from clpet.errors import ClpetError
from clpet.runs.load_run import read_record
from clpet.runtime.run_checkpoint import read_tree, write_tree
from tests.conftest import domain_args, tiny_args
from tests.runs.conftest import edit, only, put, refused

# Snapshots


def test_a_snapshot_equals_the_adapters_of_that_time(clpet, words: Path) -> None:
    """The last snapshot equals adapters/ and heads/ byte for byte; earlier heads have only the labels seen until then."""
    assert clpet("train", "method=sequential", *tiny_args(words), "train.snapshot_every=1").code == 0
    run = only()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["after-001", "after-002", "after-003"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        last = (run / "checkpoints" / "after-003" / "default" / name).read_bytes()
        assert last == (run / "adapters" / "default" / name).read_bytes()
    for row, labels in ((1, 4), (2, 8), (3, 12)):
        with safe_open(run / "checkpoints" / f"after-{row:03d}" / "heads" / "default.safetensors", "pt") as head:
            assert head.get_tensor("weight").shape[0] == labels
    assert not list(run.glob("checkpoints/.*"))


def test_snapshots_change_neither_results_nor_the_directory_name(clpet, words: Path, finished: Path) -> None:
    assert clpet("train", "method=sequential", *tiny_args(words)).code == 0
    assert only().name == finished.name
    assert (
        json.loads((only() / "results.json").read_text())["scores"]
        == json.loads((finished / "results.json").read_text())["scores"]
    )
    assert not (only() / "checkpoints").exists()
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["after-002"]


def test_a_negative_snapshot_interval_is_refused(clpet, words: Path) -> None:
    assert "train.snapshot_every must be 0" in clpet("train", *tiny_args(words), "train.snapshot_every=-1").err


# clpet eval


@pytest.mark.parametrize("method", ["dynamic_conpet", "joint", "o_lora", "crl", "ea_emr", "sapt", "independent"])
def test_every_saved_row_is_reproduced_bit_for_bit(method: str, clpet, words: Path) -> None:
    replay = ["replay=fixed"] if method in ("crl", "ea_emr") else []
    assert clpet("train", f"method={method}", *tiny_args(words), "train.snapshot_every=1", *replay).code == 0
    for after in [["--after", "3"], []] if method == "joint" else [["--after", "1"], ["--after", "2"], []]:
        answer = clpet("eval", only(), *after)
        assert answer.code == 0, answer.err + answer.out
        assert answer.out.count("equal") == 3
        assert f"after {after[1] if after else 3} of 3 tasks" in answer.out


@pytest.mark.parametrize("peft_option", ["none", "lora"])
def test_perplexities_are_reproduced_bit_for_bit(peft_option: str, clpet, prose: Path) -> None:
    """With peft=none a snapshot stores the model once, as a transformers folder; the state adds little."""
    assert (
        clpet("train", "method=sequential", *domain_args(prose, f"peft={peft_option}", "train.snapshot_every=2")).code
        == 0
    )
    for after in (["--after", "0"], ["--after", "2"], []):
        answer = clpet("eval", only(), *after)
        assert answer.code == 0, answer.err + answer.out
        assert answer.out.count("equal") == 3
    if peft_option == "none":
        snapshot = only() / "checkpoints" / "after-002"
        model_size = (snapshot / "model" / "model.safetensors").stat().st_size
        assert (snapshot / "state" / "tensors.safetensors").stat().st_size < model_size / 10


def test_a_score_that_differs_from_the_recorded_one_is_reported(clpet, run: Path) -> None:
    edit(run, lambda value: value["scores"][3].__setitem__(1, 14.0), "results.json")
    answer = clpet("eval", run)
    assert answer.code == 1
    assert answer.out.count("equal") == 2
    assert "differs by -1.5" in answer.out


def test_a_run_of_version_0_1_0_opens(clpet, run: Path) -> None:
    """Its run.json names classes by their old modules, and has the old name of train.snapshot_every."""
    old_paths = {new: old for old, new in MOVED_CLASSES.items()}

    def age(value: dict) -> None:
        for group in OBJECT_GROUPS:
            node = value["config"][group]
            node["_target_"] = old_paths.get(node["_target_"], node["_target_"])
        value["config"]["benchmark"]["objective"] = value["config"].pop("objective")["name"]
        value["config"]["train"]["keep"] = value["config"]["train"].pop("snapshot_every")
        assert value["config"]["model"]["_target_"] == "clpet.backbones.Backbone"

    edit(run, age)
    answer = clpet("eval", run)
    assert answer.code == 0, answer.err
    assert answer.out.count("equal") == 3


def test_an_unfinished_run_is_compared_with_its_checkpoint(clpet, run: Path) -> None:
    (run / "results.json").unlink()
    assert clpet("eval", run, "--after", "2").out.count("equal") == 3
    shutil.rmtree(run / "state")
    assert clpet("eval", run).out.count("not recorded") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--after", "1"], "has no weights after 1 tasks, only after 0, 2, 3"), (["--after", "-1"], "has no weights"),
     (["--limit", "3"], "are for --downstream"), (["--here", "train.lr=2"], "--here train.lr=2: can only set data_dir"),
     (["--here", "data_dir=nowhere"], "is not a folder"), (["--config-dir", "."], "needs --allow-plugins"),
     (["--downstream", "arc_easy"], "the objective of this run is classification")],
)  # fmt: skip
def test_eval_refuses(options: list[str], message: str, clpet, run: Path) -> None:
    answer = clpet("eval", run, *options)
    assert refused(answer)
    assert message in answer.err


def test_changed_data_are_refused(clpet, run: Path, words: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(words, tmp_path / "other"))
    assert clpet("eval", run, "--here", f"data_dir={other}").code == 0
    with (other / "test.jsonl").open("a") as file:
        file.write(json.dumps({"text": "fig fig", "label": "fig", "task": "fruit"}) + "\n")
    answer = clpet("eval", run, "--here", f"data_dir={other}")
    assert refused(answer)
    assert "the data differ from those of" in answer.err


# Run directories from untrusted sources


MALICIOUS = {
    "a class of another package": (put("config", "method", "_target_", value="subprocess.Popen"), "not part of clpet"),
    "a class in a list": (put("config", "benchmark", "x", value=[{"_target_": "os.system"}]), "not part of clpet"),
    "a module whose name starts with clpet": (put("config", "method", "_target_", value="clpet_evil.X"), "not part of clpet"),
    "a path as class": (put("config", "method", "_target_", value="clpet./tmp/x"), "not part of clpet"),
    "a class of another group": (put("config", "method", "_target_", value="clpet.runs.tracking.Tracking"), "is not a Method"),
    "an interpolation": (put("config", "model", "hub", value="${oc.env:HOME}"), "contains ${...}"),
    "a folder as hub id": (put("config", "model", "hub", value="../../etc"), "is not a hub id"),
    "an absolute hub id": (put("config", "model", "hub", value="/etc"), "is not a hub id"),
    "a package with a path": (put("config", "model", "package", value="os.path"), "model.package must be"),
    "a kernel from the hub": (put("config", "model", "attention", value="evil/kernel"), "model.attention must be"),
    "a task that leaves its folder": (put("config", "benchmark", "tasks", value=["../../x"]), "does not name a folder"),
    "a task name with control characters": (put("tasks", value=["a\x00", "b", "c"]), "invalid task name"),
    "an encoder that leaves its folder": (put("config", "method", "encoder", value="../../x"), "is not a name, a hub id"),
    "a method's name that is a path": (put("config", "method", "name", value=".."), "method.name must be"),
    "no config": (put("config", value=[]), "is not of the type dict"),
    "a group that is a number": (put("config", "replay", value=3), "replay must be"),
    "a missing group": (lambda value: value["config"].pop("peft"), "peft"),
    "an option of the wrong type": (put("config", "train", "epochs", value={"a": 1}), "train"),
    "an unknown option": (put("config", "evil", value=1), "unknown key evil"),
    "an impossible model": (put("config", "model", "config", "hidden_size", value="wide"), "cannot be"),
    "a deeply nested value": (put("config", "x", value=json.loads("[" * 50 + "]" * 50)), "nested too deeply"),
    "NaN": (put("config", "train", "lr", value=float("nan")), "NaN"),
    "infinity": (put("config", "train", "lr", value=float("inf")), "Infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_run_is_refused(name: str, clpet, run: Path) -> None:
    change, message = MALICIOUS[name]
    edit(run, change)
    for words in (["eval", run], ["export", run, "exported", "--merge"]):
        answer = clpet(*words)
        assert refused(answer), answer.err
        assert message in answer.err
    assert not Path("exported").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"a": ' * 5000, "3", "\xff", '{"config": 1e999}', "9" * 6000]
)
def test_invalid_json_is_refused(text: str, clpet, run: Path) -> None:
    for name, command in (("run.json", "eval"), ("results.json", "show")):
        (run / name).write_bytes(text.encode("latin-1"))
        assert refused(clpet(command, run))


def test_remote_code_is_off_unless_plugins_are_allowed(run: Path) -> None:
    edit(run, put("config", "model", "trust_remote_code", value=True))
    assert read_record(run).components.backbone.trust_remote_code is False
    assert read_record(run, plugins=True).components.backbone.trust_remote_code is True


def test_own_classes_need_allow_plugins(clpet, run: Path, tmp_path: Path) -> None:
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
    answer = clpet("eval", run, "--allow-plugins", "--config-dir", mine)
    assert answer.code == 0, answer.err
    assert (tmp_path / "ran").exists()


def test_an_option_of_an_own_class_keeps_a_name_that_clpet_renamed(clpet, run: Path, tmp_path: Path) -> None:
    """Only where the class lacks it is the recorded name an old one: here method.pull is its own, train.keep is not."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "clpet_pulling.py").write_text(
        "from dataclasses import dataclass\nfrom clpet.methods.sequential import Sequential\n\n"
        "@dataclass\nclass Pulling(Sequential):\n    pull: float = 0.5\n"
    )

    def use_own_class(value: dict) -> None:
        value["config"]["method"] |= {"_target_": "clpet_pulling.Pulling", "pull": 0.25}
        value["config"]["benchmark"]["objective"] = value["config"].pop("objective")["name"]
        value["config"]["train"]["keep"] = value["config"]["train"].pop("snapshot_every")
        value["config"]["benchmark"]["keep"] = value["config"]["benchmark"].pop("cut_last")

    edit(run, use_own_class)
    answer = clpet("eval", run, "--allow-plugins", "--config-dir", tmp_path / "mine")
    assert answer.code == 0, answer.err
    assert answer.out.count("equal") == 3


def damage(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Writes a checkpoint with a correct checksum and changed contents."""
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


def test_a_damaged_checkpoint_is_reported(clpet, run: Path) -> None:
    (run / "state" / "003" / "tensors.safetensors").write_bytes(b"pickle")
    answer = clpet("eval", run)
    assert refused(answer)
    assert "is damaged" in answer.err


def test_an_adapter_name_must_not_be_a_path(make) -> None:
    with pytest.raises(ClpetError, match="invalid adapter name"):
        make("method=sequential").method.objective.adapters.add("../x", 0)
