"""Run directories of version 0.1.0, made by that version and stored in version_0_1_0/, still open.

Their run.json names classes by the modules of that version, such as clpet.memory.DynamicReplay. Each run has three
tasks of the words benchmark on a tiny model; files that opening does not read (figures, logs) were removed.
"""

import json
import shutil
from pathlib import Path

import pytest
import transformers

from clpet.config.build import MOVED_CLASSES
from clpet.runs.load_run import read_record

OLD_RUNS = Path(__file__).parent / "version_0_1_0"
NAMES = ("replay", "kif", "o_lora")  # with replay=rate on BERT; on BERT; text_to_text on T5


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A copy of the old runs, laid out as an output folder."""
    for name in NAMES:
        signature = json.loads((OLD_RUNS / name / "run.json").read_text())["signature"]
        shutil.copytree(OLD_RUNS / name, tmp_path / "old" / "files" / name / f"s0-{signature}")
    return tmp_path / "old"


def run_of(outputs: Path, name: str) -> Path:
    (run,) = outputs.glob(f"files/{name}/s0-*")
    return run


@pytest.mark.parametrize("name", NAMES)
def test_eval_gives_the_recorded_scores(name: str, outputs: Path, words: Path, clpet) -> None:
    for after in ([], ["--after", "1"]) if name == "replay" else ([],):
        answer = clpet("eval", run_of(outputs, name), "--here", f"data_dir={words}", *after)
        assert answer.code == 0, answer.err + answer.out
        assert answer.out.count("equal") == 3


@pytest.mark.parametrize("name", NAMES)
def test_show_and_runs_print_them(name: str, outputs: Path, clpet) -> None:
    run = run_of(outputs, name)
    results = json.loads((run / "results.json").read_text())
    answer = clpet("show", run)
    assert answer.code == 0, answer.err
    row = next(line.split() for line in answer.out.splitlines() if line.startswith("river"))
    assert row == ["river", *(f"{score:.1f}" for score in results["scores"][3])]
    listed = clpet("runs", outputs, "--compare", "method", "--metrics", "average")
    assert listed.code == 0, listed.err
    assert f"{results['average']:.2f}" in listed.out


@pytest.mark.parametrize("name", NAMES)
def test_they_are_exported(name: str, outputs: Path, words: Path, clpet) -> None:
    answer = clpet("export", run_of(outputs, name), "merged", "--merge", "--here", f"data_dir={words}")
    assert answer.code == 0, answer.err
    about = json.loads(Path("merged/clpet.json").read_text())
    assert (about["method"], about["tasks"]) == (name, ["fruit", "metal", "river"])
    auto_class = transformers.AutoModelForSeq2SeqLM if name == "o_lora" else transformers.AutoModel
    assert auto_class.from_pretrained("merged").config.model_type == ("t5" if name == "o_lora" else "bert")


@pytest.mark.parametrize("name", NAMES)
def test_an_unfinished_one_is_shown_and_opened(name: str, outputs: Path, words: Path, clpet) -> None:
    run = run_of(outputs, name)
    (run / "results.json").unlink()
    assert "not finished, 3 tasks done of 3" in clpet("show", run).out
    assert clpet("eval", run, "--here", f"data_dir={words}").out.count("equal") == 3


def test_their_class_paths_are_old_ones() -> None:
    """Otherwise the tests above would prove nothing; the old paths still name classes of the right kind."""
    for name in NAMES:
        config = json.loads((OLD_RUNS / name / "run.json").read_text())["config"]
        targets = [
            config[group]["_target_"] for group in ("benchmark", "model", "peft", "replay", "hardware", "tracking")
        ]
        assert set(targets) <= MOVED_CLASSES.keys()
        assert read_record(OLD_RUNS / name).method.name == name
