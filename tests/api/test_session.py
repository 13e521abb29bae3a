"""A loop of one's own gives the numbers of `clpet.train`, in memory, and is saved as a run that every reader opens."""

import json
from pathlib import Path

import numpy as np
import pytest

import clpet
from tests.conftest import domain_args, run_cli, tiny_args


def loop(session: clpet.Session, before: bool = True) -> clpet.Session:
    """Learns and evaluates all tasks."""
    if before:
        session.evaluate()
    for task in session:
        session.learn(task)
        session.evaluate()
    return session


@pytest.mark.parametrize("method", ["replay", "dynamic_conpet", "joint"])
def test_a_loop_has_the_numbers_of_train(method: str, words: Path) -> None:
    """The whole matrix and every prediction, bit for bit."""
    settings = (f"method={method}", *tiny_args(words), "train.lr=1e-2", "train.optimizer_state=carry")
    run = clpet.train(*settings, quiet=True)
    session = loop(clpet.session(*settings, quiet=True))
    np.testing.assert_array_equal(session.matrix.scores, run.matrix.scores)
    assert session.predictions().equals(run.predictions())
    assert repr(session).endswith("1 of 1 tasks>" if method == "joint" else "3 of 3 tasks>")
    assert list(session) == []


def test_nothing_is_written_and_progress_is_printed_unless_quiet(
    words: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    loop(clpet.session("method=sequential", *tiny_args(words), "tasks=[fruit]", cache_dir=None))
    assert "task 1/1 fruit" in capsys.readouterr().out
    loop(clpet.session("method=sequential", *tiny_args(words), "tasks=[fruit]", cache_dir=None, quiet=True))
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_evaluations_may_be_left_out(words: Path) -> None:
    settings = ("method=replay", *tiny_args(words), "train.lr=1e-2")
    run = clpet.train(*settings, quiet=True)
    session = clpet.session(*settings, quiet=True)
    for name in session.tasks:
        session.learn(name)
    assert session.evaluate() == dict(zip(session.tasks, run.matrix.scores[3].tolist(), strict=True))
    assert np.isnan(session.matrix.scores[:3]).all()
    assert session.after == 3


def test_a_saved_session_is_a_run(words: Path, capsys: pytest.CaptureFixture) -> None:
    """Its record differs from that of `train` only in times; weights load, and `clpet eval` measures equal scores."""
    settings = ("method=ewc", *tiny_args(words), "train.lr=1e-2")
    run = clpet.train(*settings, quiet=True)
    session = loop(clpet.session(*settings, quiet=True))
    saved = session.save("saved/files/ewc/s0-mine")
    there, here = (json.loads((path / "results.json").read_text()) for path in (run.path, saved.path))
    there.pop("cost"), here.pop("cost")
    assert there == here
    assert saved.predictions().equals(run.predictions())
    texts = ["apple n1", "gold gold", "the nile"]
    assert saved.load().predict(texts) == run.load().predict(texts) == session.predict(texts)
    assert clpet.compare("saved").num_rows == 6
    capsys.readouterr()
    assert run_cli("eval", saved.path) == 0
    assert capsys.readouterr().out.count("equal") == 3
    with pytest.raises(clpet.ClpetError, match="already has files"):
        session.save(saved.path)


def test_tasks_are_learned_in_their_order(words: Path) -> None:
    session = clpet.session("method=sequential", *tiny_args(words), quiet=True)
    with pytest.raises(clpet.ClpetError, match="cannot learn task metal: the next task is fruit"):
        session.learn("metal")
    with pytest.raises(clpet.ClpetError, match="has not learned its task"):
        for _ in session:
            pass
    for task in session:
        session.learn(task)
    with pytest.raises(clpet.ClpetError, match="all tasks are learned"):
        session.learn("fruit")


def test_plain_text_in_a_loop(prose: Path) -> None:
    settings = ("method=sequential", *domain_args(prose), "train.epochs=1")
    session = loop(clpet.session(*settings, quiet=True))
    np.testing.assert_array_equal(session.matrix.scores, clpet.train(*settings, quiet=True).matrix.scores)
    assert session.perplexity(["gold does not rust"])[0] > 1


def test_wrong_input_is_refused(words: Path) -> None:
    with pytest.raises(clpet.ClpetError, match="unknown method"):
        clpet.session("method=ewcc")
    with pytest.raises(clpet.ClpetError, match="unknown key trian"):
        clpet.session(trian=3)
