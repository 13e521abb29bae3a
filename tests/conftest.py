"""Shared fixtures: small benchmarks, a method set up on the tiny model, and the command line in this process."""

import contextlib
import copy
import gc
import inspect
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SHARED = Path(os.environ.get("CLPET_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))


# A test whose source matches compares bits.
BITS = re.compile(r"torch\.equal|assert_array_equal|rtol=0|bit for bit|\bbits\b|bit-identical|bitwise|to_the_bit")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Adds the marker `bits` to tests that compare bits, if it is selected (see `make bits` in CONTRIBUTING.md)."""
    for item in items if "bits" in config.option.markexpr else ():
        if isinstance(item, pytest.Function) and BITS.search(inspect.getsource(item.function)):
            item.add_marker("bits")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Looks for no garbage while tests are imported, and later not among the million objects that imports create."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def shared(*parts: str) -> Path:
    """A folder of real data next to the checkout; skips the test if it is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data {'/'.join(parts)} is missing")
    return path


WORDS = {
    "fruit": ["apple", "pear", "plum", "fig"],
    "metal": ["iron", "gold", "zinc", "tin"],
    "river": ["rhine", "nile", "oder", "elbe"],
}


def write_words(folder: Path, copies: int = 6) -> Path:
    """Writes a jsonl benchmark of 12 labels that a tiny model can learn: texts repeat the label's word."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"train": [], "validation": [], "test": []}
    for task, labels in WORDS.items():
        for label in labels:
            for index in range(copies + 4):
                split = "train" if index < copies else "validation" if index < copies + 2 else "test"
                text = " ".join([label] * (1 + index % 3) + [f"n{index}"])
                rows[split].append({"text": text, "label": label, "task": task})
    for split, lines in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the words benchmark."""
    return write_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="session", autouse=True)
def shipped_yamls_are_parsed_once() -> Iterator[None]:
    """Caches parsed YAMLs: Hydra parses about 30 for each of a thousand compositions, half of their time."""
    from hydra._internal.config_repository import ConfigRepository

    from clpet.config.compose import conf_dir

    parse, parsed = ConfigRepository.load_config, {}

    def load_config(self, config_path):
        if {source.path for source in self.sources if source.scheme() == "file"} != {str(conf_dir())}:
            return parse(self, config_path)  # files of a test may change
        if config_path not in parsed:
            parsed[config_path] = parse(self, config_path)
        return copy.deepcopy(parsed[config_path])  # compositions modify the parsed YAML

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", load_config)
        yield


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)  # a PNG of one pixel
_rendered: list[bool] = []  # not empty: inside `rendering`


@pytest.fixture(scope="session", autouse=True)
def pictures_of_one_pixel() -> Iterator[None]:
    """Runs lay out their pictures and write one pixel instead: matplotlib would take half of the time of a tiny run."""
    from matplotlib.figure import Figure

    savefig = Figure.savefig

    def save(self: Figure, path: Path | str, **options: object) -> None:
        if _rendered:
            savefig(self, path, **options)
        else:
            Path(path).write_bytes(PIXEL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield


@contextlib.contextmanager
def rendering() -> Iterator[None]:
    """Pictures are rendered in the block, for tests of the pictures themselves."""
    _rendered.append(True)
    try:
        yield
    finally:
        _rendered.pop()


@pytest.fixture
def rendered() -> Iterator[None]:
    """Pictures are rendered in the test."""
    with rendering():
        yield


def run_cli(*words: object) -> int:
    """Runs `clpet ...` in this process; returns the exit code."""
    from hydra.core.global_hydra import GlobalHydra

    from clpet.cli import main

    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["clpet", *map(str, words)])
        try:
            return main.main_with_errors(sys.argv[1:])
        finally:
            GlobalHydra.instance().clear()


def killed_run(patch: Callable[[], None], cwd: Path, *words: object) -> None:
    """Runs `clpet ...` in a fork of this process, which spares the imports; `patch` makes it kill itself there."""

    def child() -> None:
        os.chdir(cwd)
        with (cwd / "killed.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        patch()
        os._exit(run_cli(*words))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (cwd / "killed.log").read_text()[-2000:]


@pytest.fixture(scope="module")
def forked_ranks() -> Iterator[None]:
    """Ranks are forks of a process that imports clpet once; spawned ones import it for five seconds each."""
    from clpet.cli import launch

    multiprocessing.set_forkserver_preload(["clpet.cli.launch", "transformers.models.llama.modeling_llama"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "START_METHOD", "forkserver")
        yield


@pytest.fixture
def clpet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Runs `clpet ...` in this process, in an empty folder; returns code, out and err."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> SimpleNamespace:
        capsys.readouterr()  # what the test itself has printed
        code = run_cli(*words)
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    yield call
    os.environ.pop("CLPET_CONFIG_DIR", None)


@cache
def classes_of(group: str) -> dict[str, type]:
    """{option: class} of a group of options."""
    from omegaconf import OmegaConf

    from clpet.cli.options import options
    from clpet.config.build import find_class

    return {name: find_class(OmegaConf.load(path)["_target_"], group) for name, path in options(group).items()}


def methods_of(objective: str) -> list[str]:
    """The methods that support an objective."""
    traits = classes_of("objective")[objective].traits
    return sorted(name for name, cls in classes_of("method").items() if not cls.unmet(traits))


QUICKER = {"mbpa": ["method.steps=1", "method.neighbours=4"]}  # options of methods whose defaults take long


def words_of(method: str) -> list[str]:
    """The overrides of a method in tests that run all of them."""
    return [f"method={method}", *QUICKER.get(method, [])]


PROSE = {
    "birds": ["the wren sings at dawn in the hedge", "an owl hunts by night over the field", "a heron waits in the reeds"],
    "metals": ["iron rusts in wet air", "gold does not rust, however old it is", "tin is a soft and silvery metal"],
    "tides": ["the tide comes in twice a day", "the moon pulls the sea", "at neap tide the water moves little"],
}  # fmt: skip


def write_prose(folder: Path, copies: int = 40) -> Path:
    """Writes three domains of plain text, with a jsonl file of documents per split."""
    for domain, lines in PROSE.items():
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for split, count in {"train": copies, "validation": 3, "test": 3}.items():
            rows = [{"text": f"{lines[i % 3]}, {split} {i}."} for i in range(count)]
            (folder / domain / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the prose domains."""
    return write_prose(tmp_path_factory.mktemp("prose"))


def domain_args(prose: Path, *more: str) -> list[str]:
    """Overrides of a run on the prose domains that takes about a second."""
    return ["model=tiny_llama", "tracking=off", "hardware=cpu", "hardware.threads=1", "benchmark=text_domains",
            f"data_dir={prose}", "benchmark.max_length=32", "train.lr=1e-2", "train.warmup_steps=2", *more]  # fmt: skip


def tiny_args(words: Path, *more: str) -> list[str]:
    """Overrides of a run that takes about a second."""
    return ["model=tiny", "tracking=off", "hardware=cpu", "hardware.threads=1", "benchmark=files", f"data_dir={words}", "benchmark.task=task",
            "benchmark.max_length=24", "train.epochs=2", *more]  # fmt: skip


@pytest.fixture
def make(words: Path):
    """A method set up on the words benchmark with the tiny model: (method, trainer, benchmark)."""
    return lambda *overrides: set_up(tiny_args(words, "cache_dir=null", *overrides))


def set_up(overrides: list[str]) -> SimpleNamespace:
    """A method set up as in a run: method, trainer, benchmark, data, config, and `learn(index)` for a task."""
    from hydra import compose, initialize_config_dir

    from clpet.config.build import parse_config
    from clpet.config.compose import conf_dir
    from clpet.config.identity import register_resolvers
    from clpet.wiring import Session

    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides)
    session = Session.build(parse_config(cfg))
    return SimpleNamespace(
        session=session,
        method=session.method,
        trainer=session.trainer,
        benchmark=session.benchmark,
        data=session.data,
        learn=session.learn,
        config=session.config,
    )


def double(values: list) -> torch.Tensor:
    """An fp64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def scores(run: SimpleNamespace, rows: np.ndarray) -> torch.Tensor:
    """[rows, 12]: scores of a method of `make` for test examples."""
    from clpet.methods.base import AnswerSpace

    with torch.inference_mode():
        return run.method.predict(run.data.test.batch(rows), AnswerSpace(range(12))).scores
