"""`clpet.train` is `clpet train`: the same folder, the same numbers, the same errors; and what a Run reads."""

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

import clpet
from tests.conftest import run_cli, tiny_args


def command_line(*words: object) -> int:
    """Runs `clpet ...` in this process without its logging, which stays set up afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return run_cli(*words)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def test_importing_clpet_imports_neither_torch_nor_hydra() -> None:
    code = (
        "import clpet, sys; clpet.Run, clpet.compare; print(sorted({'torch', 'hydra', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'clpet' has no attribute 'trian'"):
        _ = clpet.trian
    assert {"train", "load", "compare", "Run", "ClpetError"} <= set(dir(clpet))


def test_train_writes_the_folder_of_the_command_line(words: Path, capsys: pytest.CaptureFixture) -> None:
    """Same directory, same record, bit-identical scores; the second call shows the finished run."""
    assert command_line("train", "method=ewc", *tiny_args(words), "output_dir=cli", "max_train=20") == 0
    (folder,) = Path("cli").glob("*/*/s*")
    run = clpet.train("method=ewc", *tiny_args(words), output_dir="api", max_train=20)
    assert run.path == Path("api").absolute() / folder.relative_to("cli")
    there, here = (json.loads((path / "results.json").read_text()) for path in (folder, run.path))
    for volatile in ("cost", "overrides"):
        there.pop(volatile), here.pop(volatile)
    assert there == here
    cli_files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if ".hydra" not in path.parts}
    assert cli_files == {path.relative_to(run.path).as_posix() for path in run.path.rglob("*")}

    capsys.readouterr()
    seconds = (run.path / "results.json").stat().st_mtime_ns
    assert clpet.train("method=ewc", *tiny_args(words), output_dir="api", max_train=20).path == run.path
    assert "already finished" in capsys.readouterr().out
    assert (run.path / "results.json").stat().st_mtime_ns == seconds


def test_a_run_reads_what_was_measured(words: Path, capsys: pytest.CaptureFixture) -> None:
    run = clpet.train("method=sequential", *tiny_args(words), quiet=True)
    assert capsys.readouterr().out == ""
    results = json.loads((run.path / "results.json").read_text())
    np.testing.assert_array_equal(run.matrix.scores, np.array(results["scores"]))
    assert run.metrics["average"] == results["average"] == run.matrix.average()
    assert None not in run.metrics.values()
    table = run.predictions()
    assert table.column_names[:4] == ["after", "example", "task", "label"]
    assert table.num_rows == 4 * 24
    last = pyarrow.parquet.read_table(run.path / "predictions" / "after-003.parquet")
    assert run.predictions(after=3).drop_columns("after").to_pylist() == last.to_pylist()
    assert [row for row in table.to_pylist() if row["after"] == 3] == run.predictions(after=3).to_pylist()
    assert str(run).startswith("sequential on files with tiny, seed 0")
    assert eval(repr(run)).path == run.path
    with pytest.raises(clpet.ClpetError, match="no predictions after 4 tasks"):
        run.predictions(after=4)


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(clpet.ClpetError, match="is not a run directory"):
        _ = clpet.Run(tmp_path).metrics
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(clpet.ClpetError, match=r"is not finished: the same call of clpet\.train resumes it"):
        _ = clpet.Run(tmp_path).matrix
    with pytest.raises(clpet.ClpetError, match=r"has no run\.json"):
        clpet.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=ewcc"], "unknown method 'ewcc'; did you mean ewc"),
        (["train.lrr=1"], "unknown key train.lrr; did you mean train.lr"),
        (["train.lr=fast"], "train.lr"),
        (["method=ewc,lwf"], "call clpet.train once for each value"),
        (["-m"], "flags such as -m are for the command line"),
        (["method"], "is not KEY=VALUE"),
        (["hydra.run.dir=x"], "for the command line"),
        (["hardware=slurm_cpu"], "clpet train hardware=slurm_cpu"),
        (["method=lwf", "benchmark=python_domains", "model=tiny_llama"], "method=lwf does not support"),
    ],
)
def test_wrong_input_is_an_error_of_one_line(words: list[str], message: str) -> None:
    with pytest.raises(clpet.ClpetError) as error:
        clpet.train(*words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_values_of_keyword_arguments_reach_the_configuration_unchanged() -> None:
    from clpet.api.words import compose, overrides

    texts = ["true", "null", "1e-3", "a, b", "it's {text}", "ends in \\", "[x]", "", "ü"]
    for text in texts:
        cfg = compose(overrides(["benchmark=files"], {"text": text, "label": None, "tasks": [text, "b"]}))
        assert (cfg.benchmark.text, cfg.benchmark.label, list(cfg.benchmark.tasks)) == (text, None, [text, "b"])
    options = {"seed": 3, "fresh": True, "train.lr": 5e-5, "train.epochs": [1, 2], "data_dir": "~/a b"}
    cfg = compose(overrides([], options))
    assert (cfg.seed, cfg.fresh, cfg.train.lr, list(cfg.train.epochs)) == (3, True, 5e-5, [1, 2])
    assert cfg.data_dir == str(Path("~/a b").expanduser())
    with pytest.raises(clpet.ClpetError, match="cannot be the value of an option"):
        overrides([], {"seed": {1, 2}})


def test_train_works_inside_a_program_that_uses_hydra(words: Path) -> None:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from clpet.config.compose import conf_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        theirs = GlobalHydra.instance().hydra
        clpet.train("method=sequential", *tiny_args(words), "tasks=[fruit,metal]", quiet=True)
        assert GlobalHydra.instance().hydra is theirs


def test_a_method_of_ones_own_is_found_in_config_dir(words: Path) -> None:
    folder = Path("code")
    (folder / "method").mkdir(parents=True)
    (folder / "mine_from_api.py").write_text(
        "from dataclasses import dataclass\nfrom clpet.methods.base import Method\n\n\n"
        "@dataclass\nclass Mine(Method):\n    strength: float = 1.0\n"
    )
    (folder / "method" / "mine.yaml").write_text("_target_: mine_from_api.Mine\nname: mine\nstrength: 1.0\n")
    run = clpet.train("method=mine", *tiny_args(words), config_dir=folder, quiet=True)
    with pytest.raises(clpet.ClpetError, match="unknown method 'mine'"):
        clpet.train("method=mine", *tiny_args(words))
    with pytest.raises(clpet.ClpetError, match="needs allow_plugins=True"):
        clpet.load(run, config_dir=folder)
    with pytest.raises(clpet.ClpetError, match="not part of clpet"):
        clpet.load(run)
    assert clpet.load(run, config_dir=folder, allow_plugins=True).after == 3


def test_ctrl_c_saves_and_the_same_call_resumes(words: Path) -> None:
    """KeyboardInterrupt instead of an exit; the resumed run ends as an uninterrupted one, bit for bit."""
    settings = ["method=sequential", *tiny_args(words), "train.epochs=30"]
    whole = clpet.train(*settings, output_dir="whole", quiet=True)

    def interrupt() -> None:
        while not list(Path("stopped").glob("*/*/*/state/001")):
            time.sleep(0.005)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="the same call resumes"):
        clpet.train(*settings, output_dir="stopped", quiet=True)
    thread.join()
    with pytest.raises(clpet.ClpetError, match="is not finished"):
        _ = clpet.Run(next(Path("stopped").glob("*/*/s*"))).matrix
    resumed = clpet.train(*settings, output_dir="stopped", quiet=True)
    np.testing.assert_array_equal(resumed.matrix.scores, whole.matrix.scores)
    assert "resuming after" in (resumed.path / "train.log").read_text()


def test_train_works_in_a_running_event_loop(words: Path) -> None:
    """As in a cell of a notebook."""

    async def cell() -> clpet.Run:
        return clpet.train("method=sequential", *tiny_args(words), "tasks=[fruit]", quiet=True)

    assert asyncio.run(cell()).matrix.tasks == ["fruit"]


@pytest.mark.slow
def test_sigterm_saves_and_ends_the_process_as_without_clpet(words: Path) -> None:
    """The signal's default action, not an exit code of clpet's: a supervisor sees what it has sent."""
    code = f"import clpet; clpet.train('method=sequential', *{tiny_args(words)!r}, 'train.epochs=2000', quiet=True)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not list(Path("outputs").glob("*/*/*/steps.jsonl")):
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=60) == -signal.SIGTERM
    finally:
        process.kill()
    assert list(Path("outputs").glob("*/*/*/state/*/state.json"))


@pytest.mark.slow
def test_several_processes_train_one_run(words: Path) -> None:
    """From a script with a main guard: quiet, with a log, and the same scores up to rounding."""
    settings = ["method=sequential", *tiny_args(words), "tasks=[fruit,metal]"]
    script = f"""
import clpet

if __name__ == "__main__":
    clpet.train(*{settings!r}, "hardware.ranks=2", output_dir="two", quiet=True)
"""
    Path("script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "WARNING: model tiny has random weights" in done.stderr
    (folder,) = Path("two").glob("*/*/s*")
    assert "task 2/2 metal" in (folder / "train.log").read_text()
    one = clpet.train(*settings, output_dir="one", quiet=True)
    np.testing.assert_allclose(clpet.Run(folder).matrix.scores, one.matrix.scores, atol=13)  # one of eight texts
