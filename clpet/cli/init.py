"""`clpet init`: writes a commented benchmark YAML for data of one's own, or a method with its YAML and a test."""

import argparse
import keyword
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from string import Template

from clpet.cli.data import given_options
from clpet.cli.options import check_group_options, options, split_flags
from clpet.data.data_files import missing_file
from clpet.errors import ConfigError, DataError
from clpet.escape import printable

METHOD = Template('''\
"""$cls: say here in one sentence what the method does, with its paper."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clpet.data.benchmark import Task
from clpet.methods.base import Method
from clpet.training.step import StepContext


@dataclass
class $cls(Method):
    """An example to change: L = CE + strength / 2 sum (theta - theta_old)^2, theta_old from before the task."""

    strength: float = 1.0  # annotated fields are the options of the YAML

    saved: ClassVar[tuple[str, ...]] = ("old",)  # in checkpoints: the next task needs it

    def init_adapters(self) -> None:
        super().init_adapters()
        self.old: dict[str, Tensor] = {}

    def step_loss(self, context: StepContext) -> Tensor | None:
        """The penalty, added to the loss once per optimiser step; None for the first task."""
        if not self.old:
            return None
        trained = self.named_parameters()
        squares = [(trained[name][: len(old)] - old).square().sum() for name, old in self.old.items()]
        return self.strength / 2 * torch.stack(squares).sum()  # [: len(old)]: the head has grown since

    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        self.old = {name: value.detach().clone() for name, value in self.named_parameters().items()}
''')
METHOD_YAML = Template("""\
# Stays near the weights from before the task. clpet train --config-dir $folder method=$name
_target_: $name.$cls
name: $name  # name in the run directory's path
strength: 1.0  # weight of the penalty
""")
METHOD_TEST = Template('''\
"""Tests of the method $name: python -m pytest test_$name.py"""

import csv
from pathlib import Path

import clpet

HERE = Path(__file__).parent
WORDS = ("apple", "iron", "rhine", "fig")


def train(folder: Path, *words: str) -> clpet.Run:
    """A run of two tasks of two labels on a tiny model, in seconds."""
    with (folder / "data.csv").open("w", newline="") as file:
        rows = [(f"{word} {word} {number}", word) for number in range(12) for word in WORDS]
        csv.writer(file).writerows([("text", "label"), *rows])
    return clpet.train(
        "benchmark=files", "benchmark.classes_per_task=2", "model=tiny", "tracking=off", "hardware=cpu", *words,
        data_dir=folder / "data.csv", output_dir=folder / "outputs", config_dir=HERE, quiet=True,
    )


def test_a_run_is_scored_on_every_task(tmp_path: Path) -> None:
    run = train(tmp_path, "method=$name")
    assert len(run.matrix.tasks) == 2
    assert 0 <= run.metrics["average"] <= 100


def test_without_its_penalty_it_is_sequential_fine_tuning(tmp_path: Path) -> None:
    plain, mine = train(tmp_path, "method=sequential"), train(tmp_path, "method=$name", "method.strength=0")
    assert mine.matrix.scores.tolist() == plain.matrix.scores.tolist()
''')


def init(argv: list[str]) -> int:
    """`clpet init PATH ...` and `clpet init FOLDER --method NAME`. Raises ConfigError rather than overwrite a file."""
    description = (
        "Writes a commented benchmark YAML for the data at PATH or, with --method, a Python file, a YAML and a test of "
        "a method of your own. Nothing is overwritten."
    )
    parser = argparse.ArgumentParser("clpet init", description=description)
    parser.add_argument("path", help="a file or folder with data; with --method the folder to write to")
    parser.add_argument("overrides", nargs="*", help="options of the benchmark, such as label=topic model=bert_base")
    parser.add_argument("--method", metavar="NAME", help="write a method instead of a benchmark")
    parser.add_argument("--name", help="name of the benchmark (default: that of the file or folder)")
    parser.add_argument("--config-dir", help="folder to write the benchmark to (default: the folder of the data)")
    arguments = parser.parse_intermixed_args(argv)  # options may stand between the words
    path = Path(arguments.path).expanduser()
    if arguments.method:
        if arguments.overrides or arguments.name or arguments.config_dir:
            raise ConfigError("clpet init FOLDER --method NAME takes no other options")
        return _init_method(path, arguments.method)
    target = Path(arguments.config_dir).expanduser() if arguments.config_dir else None
    return _init_benchmark(path, target, arguments.name, arguments.overrides)


def _init_benchmark(path: Path, target: Path | None, name: str | None, words: list[str]) -> int:
    if not path.exists():
        raise DataError(missing_file(path))
    check_group_options(split_flags(words)[1])
    from clpet.data.benchmark_yaml import benchmark_yaml
    from clpet.data.proposal import default_name, propose

    given = given_options(words)
    proposal = propose(path, given)
    name = name or default_name(path)
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name, re.ASCII):
        raise ConfigError(f"--name {name!r} must consist of letters, digits, _ and -")
    if name in options("benchmark"):
        raise ConfigError(f"the benchmark {name} exists already: choose another name with --name NAME")
    folder = target or (path if path.is_dir() else path.parent)
    text, others = benchmark_yaml(proposal, given, name)
    command = ["clpet", "train", "--config-dir", str(folder), f"benchmark={name}", *others]
    comment = f"# {_summary(path)}. {shlex.join(command)}\n"
    _write({folder / "benchmark" / f"{name}.yaml": text.replace("\n", f"\n{comment}", 1)})
    survey = proposal.survey
    problems = [*survey.problems, *proposal.problems, *survey.report.bad_row_lines(), *survey.report.notes()]
    if problems:
        print(printable("\n".join(["problems and notes:", *(f"  {line}" for line in problems)])))
    print(printable(shlex.join(command)))
    return 0


def _summary(path: Path) -> str:
    """A description of the data for the first comment, which ends before its command."""
    return printable(f"The data in {path.name or path.absolute().name}", allowed="").replace(". ", " ")


def _init_method(folder: Path, name: str) -> int:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(f"--method {name!r} must be a Python name in lower case, such as my_method")
    if name in options("method"):
        raise ConfigError(f"the method {name} exists already: choose another name")
    spec = find_spec(name)
    if name in sys.stdlib_module_names or (spec is not None and spec.origin):
        raise ConfigError(f"a Python module is called {name}: choose another name")
    cls = "".join(word.capitalize() for word in name.split("_"))
    values = {"name": name, "cls": cls, "folder": shlex.quote(str(folder))}
    _write(
        {
            folder / f"{name}.py": METHOD.substitute(values),
            folder / "method" / f"{name}.yaml": METHOD_YAML.substitute(values),
            folder / f"test_{name}.py": METHOD_TEST.substitute(values),
        }
    )
    print(printable(shlex.join(["python", "-m", "pytest", str(folder / f"test_{name}.py")])))
    print(printable(shlex.join(["clpet", "train", "--config-dir", str(folder), f"method={name}"])))
    return 0


def _write(files: dict[Path, str]) -> None:
    """Writes new files. Raises ConfigError if one of them exists, before any is written."""
    for path in files:
        if path.exists():
            raise ConfigError(f"{path} exists already and is not overwritten: remove it, or choose another name")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        print(printable(f"wrote {path}"))
