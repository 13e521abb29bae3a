"""The command line as a newcomer meets it: help, lists, mistakes, sweeps, plugins."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from .conftest import shared, tiny_args, write_words

CLPET = [sys.executable, "-m", "clpet"]


def fastest(command: list[str], cwd: Path) -> float:
    """Best wall time of three runs, in seconds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, cwd=cwd, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_help_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    assert fastest([*CLPET, "--help"], tmp_path) < 0.3
    probe = "import sys; from clpet import cli; cli.dispatch(['--help']); cli.dispatch(['list', 'methods']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, check=False).returncode == 0


def test_config_is_printed_quickly(tmp_path: Path) -> None:
    assert fastest([*CLPET, "train", "--cfg", "job"], tmp_path) < 2
    assert not list(tmp_path.iterdir())


def test_lists(clpet) -> None:
    found = clpet("list", "methods")
    assert {line.split()[0] for line in found.out.splitlines()} >= {
        "dynamic_conpet",
        "independent",
        "joint",
        "replay",
        "sequential",
    }
    assert "top_k: 1" in clpet("list", "method", "dynamic_conpet").out
    for group in ("models", "benchmarks", "hardware", "pefts", "replays", "trackings"):
        assert clpet("list", group).code == 0
    assert "minilm" in clpet("list").out


def test_train_help_names_groups_and_examples(clpet) -> None:
    with pytest.raises(SystemExit):
        clpet("train", "--help")


def test_flags_may_stand_anywhere(clpet) -> None:
    from clpet.cli import normalised

    words = ["method=sequential", "-m", "seed=0,1", "--cfg", "job", "tasks=[a]"]
    assert normalised(words) == ["-m", "--cfg", "job", "method=sequential", "seed=0,1", "benchmark.tasks=[a]"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [("clpet tr", "train"), ("clpet train method=", "method=dynamic_conpet"), ("clpet train method=se", "method=sequential"),
     ("clpet train train.", "train.lr="), ("clpet train model=mi", "model=minilm")],
)  # fmt: skip
def test_shell_completion_goes_through_the_subcommand(line: str, expected: str, tmp_path: Path) -> None:
    env = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    found = subprocess.run(
        [*CLPET, "-sc", "query=bash"], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert expected in found.stdout.split()


def test_dry_run_shows_what_a_run_would_be_and_leaves_nothing(clpet, words: Path, tmp_path: Path) -> None:
    found = clpet("train", *tiny_args(words), "dry_run=true")
    assert found.code == 0
    for part in ("3 tasks, 12 labels", "labels apple, fig, pear, plum", "[CLS]", "trainable parameters", "times fewer",
                 "steps    fruit module 4", "selector 6 + module 6", "peak memory"):  # fmt: skip
        assert part in found.out, part
    assert not list(tmp_path.glob("outputs/files"))


def test_parameters_of_a_model_whose_weights_are_not_here(clpet) -> None:
    """Counted from the config alone: 3213 times fewer without a head (ConPET oracle 1)."""
    found = clpet("train", "model=llama_7b", "peft.r=4", "dry_run=true", "tracking=off")
    assert found.code == 0, found.err
    assert "trainable parameters 2,097,152 of 6,738,415,616: 0.031 %, 3213.1 times fewer" in found.out
    assert f"{2_097_152 + 20 * 4097:,}" in found.out
    fewrel = ["benchmark=fewrel", f"data_dir={shared('data')}"]
    assert "2778.8 times fewer" in clpet("train", "model=llama_7b", "peft.r=4", "dry_run=true", *fewrel).out


def test_a_sweep_compares_with_a_paired_test(clpet, words: Path) -> None:
    """Multirun over methods and seeds, then mean ± deviation, formulas, and references found by setting."""
    args = [*tiny_args(words), "train.epochs=8", "train.lr=2e-2"]
    assert clpet("train", "-m", "method=sequential,replay,joint,independent", "seed=0,1", *args).code == 0
    listing = clpet("runs").out
    assert listing.count("files") >= 8
    found = clpet("runs", "--compare", "method", "--metrics", "average,bwt,fwt_single_task,intransigence")
    assert found.code == 0
    rows = {line.split()[0]: line for line in reversed(found.out.splitlines()) if line}
    assert "±" in rows["sequential"]
    assert rows["sequential"].split().count("-") == 0  # both reference runs were found
    assert "95 % interval" in found.out
    assert "independent (task given)" in found.out
    for form, mark in (("md", "| --- |"), ("csv", "method,seeds,average"), ("tex", r"\begin{tabular}")):
        assert mark in clpet("runs", "--compare", "method", "--format", form).out
    assert "0.02" in clpet("runs", "--compare", "train.lr").out


def test_show_gives_formulas_and_names_missing_references(clpet, words: Path, tmp_path: Path) -> None:
    assert clpet("train", "method=sequential", *tiny_args(words)).code == 0
    (run,) = tmp_path.glob("outputs/*/*/s*")
    short, full = clpet("show", run).out, clpet("show", run, "--metrics").out
    assert "backward transfer B[i,j]" in short
    assert "cost of" in short
    assert "mean_{j<T} (R[T,j] - R[j,j]), divided by T-1" in full
    assert "needs: clpet train method=independent model=tiny" in full


def test_own_method_is_one_python_file_and_one_yaml(clpet, words: Path, tmp_path: Path) -> None:
    """A method in the user's own folder: gradients halved, everything else inherited."""
    mine = tmp_path / "mine"
    (mine / "method").mkdir(parents=True)
    (mine / "gentle.py").write_text(
        "from dataclasses import dataclass\n"
        "from clpet.methods.base import Method\n\n"
        "@dataclass\n"
        "class Gentle(Method):\n"
        "    factor: float = 0.5\n\n"
        "    def adjust_gradients(self):\n"
        "        for parameter in self.parameters():\n"
        "            parameter.grad *= self.factor\n"
    )
    (mine / "method" / "gentle.yaml").write_text(
        "# Halves gradients.\n_target_: gentle.Gentle\nname: gentle\nfactor: 0.25\n"
    )
    found = clpet("train", "--config-dir", mine, "method=gentle", *tiny_args(words))
    assert found.code == 0, found.err
    assert list(tmp_path.glob("outputs/files/gentle/s0-*/results.json"))
    assert "Halves gradients" in clpet("list", "methods", "--config-dir", mine).out


def test_a_class_from_elsewhere_is_not_run(clpet, words: Path, tmp_path: Path) -> None:
    found = clpet("train", "method=sequential", *tiny_args(words), "method._target_=os.system")
    assert found.code == 2
    assert "neither part of clpet nor in a --config-dir folder" in found.err


def one_line(found) -> str:
    """The error of a refused command: exit code 2, one line, no traceback, no run directory."""
    assert found.code == 2, (found.code, found.err)
    assert found.err.startswith("clpet: ")
    assert found.err.count("\n") == 1, found.err
    assert "Traceback" not in found.out
    return found.err


BAD = [
    ("unknown command", ["trian"], "did you mean train?"),
    ("unknown method", ["train", "method=dynamic_conpte"], "did you mean dynamic_conpet?"),
    ("unknown model", ["train", "model=minilmm"], "did you mean minilm?"),
    ("unknown benchmark", ["train", "benchmark=clinc"], "did you mean clinc150?"),
    ("unknown hardware", ["train", "hardware=tpu"], "there is no such hardware"),
    ("mistyped key", ["train", "train.epohcs=3"], "did you mean train.epochs?"),
    ("mistyped method key", ["train", "method.topk=2"], "did you mean method.top_k?"),
    ("added unknown key", ["train", "+method.alpha=2"], "unknown key method.alpha"),
    ("unknown top-level key", ["train", "sede=3"], "did you mean seed?"),
    ("wrong type", ["train", "train.lr=fast"], "train.lr"),
    ("wrong type in a method", ["train", "method.top_k=many"], "method.top_k"),
    ("wrong choice", ["train", "train.schedule=sometimes"], "train.schedule"),
    ("syntax", ["train", "benchmark.tasks=[a,"], "benchmark.tasks=[a,"),
    ("no epochs", ["train", "train.epochs=0"], "train.epochs must be at least 1, not 0"),
    ("negative rate", ["train", "train.lr=-1"], "train.lr must be 0 or more"),
    ("no batch", ["train", "train.global_batch_size=0"], "train.global_batch_size must be at least 1"),
    ("negative seed", ["train", "seed=-1"], "seed must be 0 or more"),
    ("no modules", ["train", "method.top_k=0"], "method.top_k must be at least 1"),
    ("no rank", ["train", "peft.r=0"], "peft.r must be at least 1"),
    ("no train examples", ["train", "benchmark.max_train=0"], "benchmark.max_train must be at least 1"),
    ("data_dir is missing", ["train", "benchmark=clinc150", "data_dir=nowhere"], "data_dir=nowhere is not a folder"),
    ("data_dir is empty", ["train", "benchmark=files", "data_dir=."], "nor a single data file"),
    ("files need data_dir", ["train", "benchmark=files"], "say data_dir=FOLDER"),
    ("missing column", ["train", "benchmark=files", "data_dir=WORDS", "text=body"], "has no column body"),
    ("missing label column", ["train", "benchmark=files", "data_dir=WORDS", "label=topic"], "has no column topic"),
    ("unknown task", ["train", "benchmark=files", "data_dir=WORDS", "benchmark.task=task", "tasks=[fruits]"], "did you mean fruit?"),
    ("unknown order", ["train", "order=upwards"], "benchmark.order=upwards is none of"),
    ("order misses a task", ["train", "order=[data,code]"], "must list every task once"),
    ("task without test examples", ["train", "benchmark=files", "data_dir=NOTEST", "benchmark.task=task"], "has no test examples"),
    ("label unseen in train", ["train", "benchmark=files", "data_dir=UNSEEN"], "'new' occurs in test but not in train"),
    ("empty text", ["train", "benchmark=files", "data_dir=EMPTY"], "row 1 has an empty text"),
    ("label is null", ["train", "benchmark=files", "data_dir=NULL"], "row 0 has the label None"),
    ("broken file", ["train", "benchmark=files", "data_dir=BROKEN"], "cannot be read as parquet"),
    ("partition does not cover", ["train", "benchmark=files", "data_dir=WORDS", "benchmark.task_labels={a: [apple]}"], "does not cover"),
    ("model is not there", ["train", "model=bert_base"], "hf download google-bert/bert-base-uncased"),
    ("model path", ["train", "model=local", "model.path=."], "has no config.json"),
    ("local model without path", ["train", "model=local"], "model.path"),
    ("wrong adapter layer", ["train", "model=tiny", "peft.targets=[q_proj]"], "peft.targets names the layer q_proj"),
    ("method without memory", ["train", "method=dynamic_conpet", "replay=none"], "replay=dynamic"),
    ("replay for nothing", ["train", "method=sequential", "replay=fixed"], "replays nothing"),
    ("adapter per task without adapters", ["train", "method=independent", "peft=none"], "peft=none"),
    ("no mask in the template", ["train", "model=tiny", "model.representation=mask"], "{mask}"),
    ("no text in the template", ["train", "benchmark.template=hello"], "contains {text}"),
    ("output is a file", ["train", "output_dir=FILE"], "FILE"),
    ("config dir", ["train", "--config-dir", "nowhere"], "is not a folder"),
    ("list of nothing", ["list", "metods"], "did you mean method"),
    ("list of an unknown", ["list", "method", "nosuch"], "there is no method nosuch"),
    ("runs elsewhere", ["runs", "nowhere"], "nowhere is not a folder"),
    ("compare by nothing", ["runs", ".", "--compare", "method"], "no finished runs"),
    ("show nothing", ["show", "nowhere"], "is not a run directory"),
    ("betas", ["train", "train.betas=[2,3]"], "train.betas must be two numbers in [0, 1)"),
    ("eps", ["train", "train.eps=-1"], "train.eps must be more than 0"),
    ("threads", ["train", "hardware.threads=-1"], "hardware.threads must be at least 1"),
    ("no selector to start from", ["train", "model=tiny", "method.top_k=5", "method.warm_start=selector"], "there is no selector"),
    ("longer than the model reads", ["train", "model=tiny", "benchmark.max_length=1024"], "reads at most 512 tokens"),
    ("impossible shape", ["train", "model=tiny", "model.config.hidden_size=33"], "cannot be made from model.config"),
    ("impossible attention", ["train", "model=tiny", "model.attention=flash"], "cannot be made from model.config"),
    ("no model at all", ["train", "model=null"], "model=null: there is no such model"),
    ("task named twice", ["train", "tasks=[data,data]"], "names a task twice"),
    ("negative clip", ["train", "method.selector_clip=-1"], "method.selector_clip must be 0 (off) or more"),
    ("too few per label", ["train", "benchmark.per_label=0"], "benchmark.per_label must be at least 4"),
    ("path in a name", ["train", "method.name=a/b"], "method.name must be letters"),
    ("unknown slot", ["train", "benchmark.template='{text} about {title}'"], "whose slots are among {text}, {mask}"),
    ("flag without value", ["train", "--config-dir"], "--config-dir needs a value"),
    ("unknown flag", ["train", "--multi"], "unknown flag --multi"),
    ("fewer than labels", ["train", "benchmark.max_train=2"], "too few for the 4 labels of task data"),
    ("sweep without -m", ["train", "seed=0,1"], "add -m"),
    ("added group", ["train", "+experiment=foo"], "experiment"),
    ("batch without room for old", ["train", "train.global_batch_size=1"], "both must be at least 1"),
    ("best without validation", ["train", "model=tiny", "train.select=best", "benchmark.validation_share=0"], "no validation examples"),
    ("data of an unknown", ["data", "nosuch"], "there is no such benchmark"),
]  # fmt: skip


@pytest.fixture
def places(tmp_path: Path, words: Path) -> dict[str, str]:
    """Good and bad data folders by name."""

    def folder(name: str, train: list[dict], test: list[dict] | None = None) -> str:
        path = tmp_path / name.lower()
        path.mkdir()
        for split, rows in (("train", train), ("test", test)):
            if rows is not None:
                (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    good = [{"text": f"t{i}", "label": "ab"[i % 2], "task": "x"} for i in range(8)]
    (tmp_path / "FILE").write_text("in the way")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 no parquet")
    return {
        "WORDS": str(words),
        "NOTEST": folder("NOTEST", [*good, {"text": "y", "label": "c", "task": "y"}], good),
        "UNSEEN": folder("UNSEEN", good, [{"text": "t", "label": "new"}]),
        "EMPTY": folder("EMPTY", [good[0], {"text": " ", "label": "a"}]),
        "NULL": folder("NULL", [{"text": "t", "label": None}, good[0]]),
        "BROKEN": str(tmp_path / "broken"),
        "FILE": str(tmp_path / "FILE"),
    }


@pytest.mark.parametrize(("name", "command", "expected"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_input_gets_one_line(name: str, command: list[str], expected: str, clpet, places: dict[str, str]) -> None:
    words = [word.partition("=")[0] + "=" + places.get(word.partition("=")[2], word.partition("=")[2]) if "=" in word else word
             for word in command]  # fmt: skip
    if words[0] == "train":
        words.insert(1, "tracking=off")
    assert expected in one_line(clpet(*words))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_that_may_not_be_written(clpet, words: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "locked" in one_line(clpet("train", *tiny_args(words), "output_dir=locked/x"))


def test_a_read_only_output_folder(clpet, words: Path) -> None:
    """/proc takes no folders, whoever asks."""
    assert "/proc" in one_line(clpet("train", *tiny_args(words), "output_dir=/proc/clpet"))


def test_a_corrupt_result_is_refused(clpet, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text('{"tasks": 3}')
    assert "is not the result of a run" in one_line(clpet("show", run))


def test_a_benchmark_of_ones_own_is_inspected(clpet, words: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "benchmark"
    mine.mkdir(parents=True)
    yaml = "# Mine.\ndefaults:\n  - files@_here_\n  - _self_\nname: mine\ntask: task\n"
    (mine / "mine.yaml").write_text(yaml)
    found = clpet("data", "mine", f"data_dir={words}", "model=tiny", "--config-dir", mine.parent)
    assert found.code == 0, found.err
    assert "river" in found.out


def test_what_nobody_foresaw_is_one_line_and_a_file(clpet, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clpet.run import Experiment

    def broken(*_: object) -> None:
        raise RuntimeError("out of cheese\nsecond line")

    monkeypatch.setattr(Experiment, "learn", broken)
    found = clpet("train", "method=sequential", *tiny_args(words))
    assert found.code == 1
    assert found.err.count("\n") == 1
    assert "RuntimeError: out of cheese" in found.err
    path = Path(found.err.split("report it with ")[1].split(": RuntimeError")[0])
    assert "Traceback" in path.read_text()


def test_a_failing_run_does_not_stop_a_sweep(clpet, words: Path, tmp_path: Path) -> None:
    found = clpet("train", "-m", "method=sequential,joint", "replay=none,fixed", *tiny_args(words))
    assert found.code == 2
    assert found.err.count("replays nothing") == 2
    assert len(list(tmp_path.glob("outputs/*/*/s*/results.json"))) == 2


def test_data_report(clpet, words: Path) -> None:
    found = clpet("data", "files", f"data_dir={words}", "benchmark.task=task", "model=tiny")
    assert found.code == 0
    assert [line.split()[:4] for line in found.out.splitlines()[1:4]] == [["fruit", "24", "8", "8"], ["metal", "24", "8", "8"],
                                                                         ["river", "24", "8", "8"]]  # fmt: skip
    assert "fingerprint: " in found.out


def test_a_warning_when_test_text_is_in_train(clpet, tmp_path: Path) -> None:
    data = write_words(tmp_path / "data")
    train = (data / "train.jsonl").read_text().splitlines()
    with (data / "test.jsonl").open("a") as file:
        file.write(train[0] + "\n")
    found = clpet("train", "method=sequential", *tiny_args(data))
    assert found.code == 0
    assert "1 of 25 test texts of files also occur in train" in found.err + found.out
    (path,) = tmp_path.glob("outputs/*/*/s*/results.json")
    assert json.loads(path.read_text())["data"]["overlaps"] == {"test in train": 1}


def test_parquet_and_jsonl_give_the_same_run(clpet, words: Path, tmp_path: Path) -> None:
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (words / f"{split}.jsonl").read_text().splitlines()]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet / f"{split}.parquet")
    scores = []
    for data in (words, parquet):
        assert clpet("train", "method=sequential", *tiny_args(data), f"output_dir=out-{data.name}").code == 0
        (path,) = tmp_path.glob(f"out-{data.name}/*/*/s*/results.json")
        scores.append(json.loads(path.read_text())["scores"])
    assert scores[0] == scores[1]
