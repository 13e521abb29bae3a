"""The command line: help, lists, errors, sweeps, plugins."""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from clpet.cli.train import garbage_ignored
from clpet.config.compose import conf_dir
from tests.conftest import shared, tiny_args, write_words

CLPET = [sys.executable, "-m", "clpet"]


def imported(tmp_path: Path, *words: str, code: int = 0) -> set[str]:
    """The slow packages that a command imports."""
    probe = (
        "import sys; from clpet.cli import main; code = main.main_with_errors(sys.argv[1:]); "
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", probe, *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    return {"torch", "transformers", "peft", "datasets", "hydra", "numpy", "rich"} & set(result.stderr.split())


def test_commands_import_only_what_they_need(tmp_path: Path) -> None:
    """Help and lists import none of them; a wrong value is reported, and runs are read, without torch."""
    assert imported(tmp_path, "--help") == set()
    assert imported(tmp_path, "list", "methods") == set()
    heavy = {"torch", "transformers", "peft", "datasets"}
    assert not heavy & imported(tmp_path, "train", "--cfg", "job")
    assert not list(tmp_path.iterdir())
    assert not heavy & imported(tmp_path, "train", "train.epochs=two", code=2)
    assert not heavy & imported(tmp_path, "runs", "outputs", "--compare", "method", code=2)


@pytest.mark.slow
def test_help_and_the_config_are_printed_quickly(tmp_path: Path) -> None:
    """Best wall time of three."""
    for words, limit in ((["--help"], 0.3), (["train", "--cfg", "job"], 2)):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([*CLPET, *words], cwd=tmp_path, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        assert min(times) < limit, words


def test_lists(clpet) -> None:
    result = clpet("list", "methods")
    assert {line.split()[0] for line in result.out.splitlines()} >= {
        "dynamic_conpet",
        "independent",
        "joint",
        "replay",
        "sequential",
    }
    assert "top_k: 1" in clpet("list", "method", "dynamic_conpet").out
    for group in ("models", "benchmarks", "hardware", "pefts", "replays", "trackings"):
        assert clpet("list", group).code == 0
    assert {line.split()[0] for line in clpet("list", "experiments", "mocl").out.splitlines()} == {"mocl/fewshot_llama"}


def test_an_overview_counts_the_options_of_every_group(clpet) -> None:
    lines = [line.split(maxsplit=2) for line in clpet("list").out.splitlines() if line]
    assert len(lines) < 30
    counts = {label: count for label, count, _ in lines}
    assert counts["methods"] == str(len(clpet("list", "methods").out.splitlines()))
    papers = {path.name for path in (conf_dir() / "experiment").iterdir() if path.is_dir()}
    assert papers <= counts.keys()
    assert sum(int(counts[paper]) for paper in papers) == int(counts["experiments"])


def test_train_help_exits(clpet) -> None:
    with pytest.raises(SystemExit):
        clpet("train", "--help")


def test_flags_may_come_anywhere(clpet) -> None:
    from clpet.cli.options import normalize_argv

    words = ["method=sequential", "-m", "seed=0,1", "--cfg", "job", "tasks=[a]"]
    assert normalize_argv(words) == ["-m", "--cfg", "job", "method=sequential", "seed=0,1", "benchmark.tasks=[a]"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [("clpet tr", "train"), ("clpet train method=", "method=dynamic_conpet"), ("clpet train method=se", "method=sequential"),
     ("clpet train train.", "train.lr="), ("clpet train model=mi", "model=minilm")],
)  # fmt: skip
def test_shell_completion_goes_through_the_subcommand(line: str, expected: str, tmp_path: Path) -> None:
    env = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    result = subprocess.run(
        [*CLPET, "-sc", "query=bash"], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert expected in result.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [("clpet show outputs/fi", ["outputs/files/sequential/s0-12345678"]),
     ("clpet export ", ["outputs/files/sequential/s0-12345678"]),
     ("clpet data clinc", ["clinc150", "clinc150_15x10"]),
     ("clpet list me", ["methods"]), ("clpet list method sequ", ["sequential"]),
     ("clpet runs --compare met", ["method"]), ("clpet runs out --compare method,train.epo", ["method,train.epochs"]),
     ("clpet runs --compare method --metrics average,forge", ["average,forgetting"]),
     ("clpet report --compare see", ["seed"]), ("clpet data clinc150 x", [])],
)  # fmt: skip
def test_completion_offers_what_a_command_takes(
    line: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clpet
) -> None:
    (tmp_path / "outputs" / "files" / "sequential" / "s0-12345678").mkdir(parents=True)
    monkeypatch.setenv("COMP_LINE", line)
    assert clpet("-sc", "query=bash").out.split() == expected


def test_a_dry_run_describes_the_run_and_writes_nothing(clpet, words: Path, tmp_path: Path) -> None:
    result = clpet("train", *tiny_args(words), "dry_run=true")
    assert result.code == 0
    for text in ("3 tasks, 12 labels", "labels apple, fig, pear, plum", "[CLS]", "trainable parameters", "times fewer",
                 "steps    fruit module 4", "selector 12 + module 6", "peak memory"):  # fmt: skip
        assert text in result.out, text
    assert not list(tmp_path.glob("outputs/files"))


def test_parameters_of_a_model_without_local_weights(clpet) -> None:
    """Counted from the config alone: 3213 times fewer without a head (ConPET oracle 1)."""
    result = clpet("train", "model=llama_7b", "peft.r=4", "dry_run=true", "tracking=off")
    assert result.code == 0, result.err
    assert "trainable parameters 2,097,152 of 6,738,415,616: 0.031 %, 3213.1 times fewer" in result.out
    assert f"{2_097_152 + 20 * 4097:,}" in result.out
    assert "optimiser 16 MB (adamw)" in result.out
    fewrel = ["benchmark=fewrel", f"data_dir={shared('data')}"]
    assert "2778.8 times fewer" in clpet("train", "model=llama_7b", "peft.r=4", "dry_run=true", *fewrel).out


@pytest.mark.slow
def test_a_sweep_compares_with_a_paired_test(clpet, words: Path) -> None:
    """A sweep over methods and seeds: mean ± standard deviation, formulas, and reference runs of the same setting."""
    args = [*tiny_args(words), "train.lr=2e-2"]
    assert clpet("train", "-m", "method=sequential,joint,independent", "seed=0,1", *args).code == 0
    listing = clpet("runs").out
    assert listing.count("files") >= 6
    result = clpet("runs", "--compare", "method", "--metrics", "average,bwt,fwt_single_task,intransigence")
    assert result.code == 0
    rows = {line.split()[0]: line for line in reversed(result.out.splitlines()) if line}
    assert "±" in rows["sequential"]
    assert rows["sequential"].split().count("-") == 0  # both reference runs exist
    assert "95 % interval" in result.out
    assert "independent (task given)" in result.out
    for form, mark in (
        ("md", "| --- |"),
        ("csv", "benchmark,objective,metric,data,split,view,method,"),
        ("tex", r"\begin{tabular}"),
    ):
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


def test_a_users_method_is_one_python_file_and_one_yaml(clpet, words: Path, tmp_path: Path) -> None:
    """A method in the user's own folder: gradients halved, everything else inherited."""
    mine = tmp_path / "mine"
    (mine / "method").mkdir(parents=True)
    (mine / "gentle.py").write_text(
        "from dataclasses import dataclass\n"
        "from clpet.methods.base import Method\n\n"
        "@dataclass\n"
        "class Gentle(Method):\n"
        "    factor: float = 0.5\n\n"
        "    def adjust_gradients(self, context):\n"
        "        for parameter in self.parameters():\n"
        "            parameter.grad *= self.factor\n"
    )
    (mine / "method" / "gentle.yaml").write_text(
        "# Halves gradients.\n_target_: gentle.Gentle\nname: gentle\nfactor: 0.25\n"
    )
    result = clpet("train", "--config-dir", mine, "method=gentle", *tiny_args(words))
    assert result.code == 0, result.err
    assert list(tmp_path.glob("outputs/files/gentle/s0-*/results.json"))
    assert "Halves gradients" in clpet("list", "methods", "--config-dir", mine).out


@pytest.mark.parametrize(("code", "error"), [
    ("def learn(self, *_):\n        return undefined", "NameError: name 'undefined' is not defined"),
    ("def learn(self:", "SyntaxError: "),
])  # fmt: skip
def test_an_error_in_a_users_method_is_reported_with_file_and_line(
    code: str, error: str, clpet, words: Path, tmp_path: Path
) -> None:
    name = "mine" + error.split(":")[0].lower()
    (tmp_path / "mine" / "method").mkdir(parents=True)
    body = (
        "from dataclasses import dataclass\nfrom clpet.methods.base import Method\n\n@dataclass\nclass Mine(Method):\n"
    )
    (tmp_path / "mine" / f"{name}.py").write_text(f"{body}    {code}\n")
    (tmp_path / "mine" / "method" / "mine.yaml").write_text(f"_target_: {name}.Mine\nname: mine\n")
    result = clpet("train", "--config-dir", tmp_path / "mine", "method=mine", *tiny_args(words))
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert f"mine/{name}.py:" in result.err
    assert error in result.err
    assert "report" not in result.err


def test_a_class_of_another_package_is_rejected(clpet, words: Path, tmp_path: Path) -> None:
    result = clpet("train", "method=sequential", *tiny_args(words), "method._target_=os.system")
    assert result.code == 2
    assert "neither part of clpet nor in a --config-dir folder" in result.err


def test_data_describes_a_users_benchmark(clpet, words: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "benchmark"
    mine.mkdir(parents=True)
    yaml = "# Mine.\ndefaults:\n  - files@_here_\n  - _self_\nname: mine\ntask: task\n"
    (mine / "mine.yaml").write_text(yaml)
    result = clpet("data", "mine", f"data_dir={words}", "model=tiny", "--config-dir", mine.parent)
    assert result.code == 0, result.err
    assert "river" in result.out


def test_an_unexpected_error_is_one_line_and_a_file(clpet, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clpet.run import Experiment

    def broken(*_: object) -> None:
        raise RuntimeError("out of cheese\nsecond line")

    monkeypatch.setattr(Experiment, "learn", broken)
    result = clpet("train", "method=sequential", *tiny_args(words))
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "RuntimeError: out of cheese" in result.err
    path = Path(result.err.split("report it with ")[1].split(": RuntimeError")[0])
    assert "Traceback" in path.read_text()


def test_a_failing_run_does_not_stop_a_sweep(clpet, words: Path, tmp_path: Path) -> None:
    result = clpet("train", "-m", "method=sequential,joint", "replay=none,fixed", *tiny_args(words))
    assert result.code == 2
    assert result.err.count("does not replay") == 2
    assert "clpet: method=sequential replay=fixed: method=sequential does not replay" in result.err
    assert "· method=sequential replay=none: average" in result.out
    assert len(list(tmp_path.glob("outputs/*/*/s*/results.json"))) == 2


def test_data_report(clpet, words: Path) -> None:
    result = clpet("data", "files", f"data_dir={words}", "benchmark.task=task", "model=tiny")
    assert result.code == 0
    assert [line.split()[:4] for line in result.out.splitlines()[1:4]] == [["fruit", "24", "8", "8"], ["metal", "24", "8", "8"],
                                                                         ["river", "24", "8", "8"]]  # fmt: skip
    assert "fingerprint: " in result.out


def test_a_warning_when_test_text_is_in_train(clpet, tmp_path: Path) -> None:
    data = write_words(tmp_path / "data")
    train = (data / "train.jsonl").read_text().splitlines()
    with (data / "test.jsonl").open("a") as file:
        file.write(train[0] + "\n")
    result = clpet("train", "method=sequential", *tiny_args(data))
    assert result.code == 0
    assert "1 of 25 test texts of files also occur in train" in result.err + result.out
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


def test_show_prints_the_finished_tasks_of_an_unfinished_run(clpet, words: Path, tmp_path: Path) -> None:
    assert clpet("train", "method=sequential", *tiny_args(words)).code == 0
    (run,) = tmp_path.glob("outputs/*/*/s*")
    (run / "results.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n")
    result = clpet("show", run)
    assert result.code == 0
    assert "not finished, 2 tasks done of 3; resume with:" in result.out
    assert "metal" in result.out.splitlines()[-1]
    assert "fruit" in result.out.splitlines()[-2]
    (run / "metrics.jsonl").write_text('{"done": "x"}\n')
    assert clpet("show", run).code == 2
    again = clpet("train", "method=sequential", *tiny_args(words))
    assert again.code == 0
    finished = clpet("train", "method=sequential", *tiny_args(words))
    assert "already finished; showing its results (fresh=true runs it again)" in finished.out
    assert "already finished" not in again.out


def test_no_garbage_is_collected_during_imports() -> None:
    with garbage_ignored():
        assert not gc.isenabled()
    assert gc.isenabled()
