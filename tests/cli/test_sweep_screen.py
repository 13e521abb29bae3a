"""What a sweep prints, and that the commands it prints run."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from clpet.cli.sweep_screen import SweepRun, SweepScreen, expand_sweep, rough_duration
from tests.conftest import tiny_args

FAST = ["train.epochs=1", "benchmark.max_test=4", "evaluation.predictions=false"]


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def test_a_sweep_prints_a_line_per_run_a_table_and_a_command_that_runs(clpet, words: Path, tmp_path: Path) -> None:
    """Two runs fail while they train. The output folder has a space in its name."""
    sweep = ["method=sequential,independent", "train.lr=1e-2,1e30", "output_dir=out 1"]
    result = clpet("train", "-m", *tiny_args(words), *FAST, *sweep)
    assert result.code == 1, result.err
    lines = lines_of(result.out)
    assert lines[0] == "sweep of 4 runs; each writes its progress to train.log in its folder"
    runs = [line for line in lines if line.startswith("run ")]
    assert [re.sub(r"about [\d.]+ (s|min|h)", "about T", line).split(" · ")[0] for line in runs] == [
        "run 1 of 4, about T left", "run 2 of 4, about T left", "run 3 of 4, about T left", "run 4 of 4"
    ]  # fmt: skip
    assert "method=sequential train.lr=0.01: average" in runs[0]
    start = lines.index(runs[-1]) + 1
    table = lines[start : start + 5]
    assert table[0].split() == ["method", "train.lr", "average", "bwt", "seconds"]
    assert [row.split()[:2] for row in table[1:]] == [
        ["sequential", "0.01"], ["sequential", "1e+30"], ["independent", "0.01"], ["independent", "1e+30"]
    ]  # fmt: skip
    failed = [line for line in lines if line.startswith("failed ")]
    assert len(failed) == 2
    log = Path(failed[0].rpartition("; log ")[2])
    reason = failed[0].partition("train.lr=1e+30: ")[2].partition("; log ")[0]
    assert "lower train.lr" in reason
    assert f"[ERROR] {reason}" in log.read_text()
    assert json.loads((log.parent / "failed.json").read_text()) == {"error": reason}
    command = next(line.removeprefix("compare  clpet ") for line in lines if line.startswith("compare "))
    assert shlex.split(command) == ["runs", "out 1", "--compare", "method,train.lr"]
    compared = clpet(*shlex.split(command))
    assert compared.code == 0, compared.err
    assert "independent" in compared.out
    listed = clpet("runs", "out 1")
    assert len([line for line in listed.out.splitlines() if " failed " in line]) == 2
    shown = clpet("show", str(log.parent))
    assert f"failed: {reason}" in shown.out


@pytest.mark.slow
def test_twelve_runs_print_at_most_sixty_lines(clpet, words: Path) -> None:
    """All of them warn: the model has random weights."""
    result = clpet(
        "train", "-m", *tiny_args(words), *FAST, "method=sequential", f"seed={','.join(map(str, range(12)))}"
    )
    assert result.code == 0, result.err
    assert len((result.out + result.err).splitlines()) <= 60
    assert len([line for line in lines_of(result.err) if "random weights" in line]) <= 1


def test_commands_that_a_run_prints_run_with_their_config_dir_and_quotes(clpet, words: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my code"
    (folder / "method").mkdir(parents=True)
    (folder / "mine_too.py").write_text(
        "from dataclasses import dataclass\nfrom clpet.methods.base import Method\n\n@dataclass\nclass Mine(Method):\n"
        '    """Mine."""\n    name: str = "mine_too"\n'
    )
    (folder / "method" / "mine_too.yaml").write_text("# Mine. clpet train\n_target_: mine_too.Mine\nname: mine_too\n")
    template = "benchmark.prompt='{text} :'"
    result = clpet("train", "--config-dir", str(folder), "method=mine_too", *tiny_args(words), *FAST, template)
    assert result.code == 0, result.err
    (printed,) = [line.strip() for line in result.out.splitlines() if line.strip().startswith("clpet train")]
    os.environ.pop("CLPET_CONFIG_DIR")  # as in a new shell
    parts = shlex.split(printed)[1:]
    assert parts[:3] == ["train", "--config-dir", str(folder)]
    assert template in parts
    assert clpet(*parts).code == 0
    (run,) = tmp_path.glob("outputs/*/mine_too/*")
    (shown,) = [line for line in clpet("show", str(run)).out.splitlines() if line.startswith("clpet train")]
    os.environ.pop("CLPET_CONFIG_DIR")
    assert "already finished" in clpet(*shlex.split(shown)[1:]).out


def test_the_time_left_is_the_mean_of_the_runs_that_have_ended(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    screen = SweepScreen(5, "outputs", at_once=2)
    for number, seconds in enumerate((100.0, 300.0), 1):
        screen.finished(SweepRun(number, [f"seed={number}"], tmp_path, seconds, "it failed"))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "run 1 of 5, about 3 min left · seed=1: failed · 100 s",  # 4 runs of 100 s, two at a time
        "run 2 of 5, about 5 min left · seed=2: failed · 300 s",  # 3 runs of 200 s
    ]
    assert [rough_duration(seconds) for seconds in (40, 840, 9000)] == ["40 s", "14 min", "2.5 h"]
    assert "compare" not in screen.closing()


def test_runs_of_a_sweep_are_counted_as_hydra_makes_them() -> None:
    words = ["-m", "method=a,b", "seed=range(3)", "x=[1,2]", "train.lr=1e-3", "fresh=false"]
    assert expand_sweep(words) == (6, {"method", "seed"})
    assert expand_sweep(["method=a"]) == (1, set())
