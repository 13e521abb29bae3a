"""`clpet data`: a report on a benchmark, or on a file or folder of one's own, without training."""

import argparse
from pathlib import Path

from clpet.cli.options import check_group_options, options, split_flags
from clpet.config.compose import compose_config
from clpet.config.overrides import SHORT_KEYS
from clpet.data.data_files import missing_file
from clpet.errors import DataError, suggest
from clpet.escape import printable


def data(argv: list[str]) -> int:
    """`clpet data BENCHMARK key=value ...` or `clpet data PATH key=value ...`: a report on the data, without training.

    For a path it ends with the command that trains on it; the exit code is 2 if the data cannot be learned as they are.
    """
    description = (
        "Counts, balance, lengths, duplicates and overlaps of a benchmark, without training. For a file or folder: "
        "what it could be, its problems, and the command that trains on it."
    )
    parser = argparse.ArgumentParser("clpet data", description=description)
    parser.add_argument("benchmark", help="an option of clpet list benchmarks, or a path such as my.csv or my/")
    parser.add_argument("overrides", nargs="*", help="such as data_dir=FOLDER model=bert_base benchmark.max_train=100")
    parser.add_argument("--config-dir", help="a folder with your own YAMLs")
    arguments = parser.parse_intermixed_args(argv)  # options may stand between the words
    folder = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    _, overrides = split_flags([*folder, *arguments.overrides])
    name, path = arguments.benchmark, Path(arguments.benchmark).expanduser()
    if name not in options("benchmark"):
        if not path.exists():
            raise DataError(_unknown(name, path))
        return _path_report(path, arguments.overrides, overrides)
    check_group_options([f"benchmark={name}", *overrides])
    cfg = compose_config([f"benchmark={name}", *overrides])
    from clpet.evaluation.data_inspection import report  # imports torch: only after the options are checked

    print(printable(report(cfg)))
    return 0


def _unknown(name: str, path: Path) -> str:
    """What is similar to a name that is neither a path nor a benchmark; a name such as my.csv is meant as a path."""
    message = missing_file(path)
    if path.suffix or len(path.parts) > 1 or message.endswith("?"):
        return message
    return f"{name} is neither a file or folder nor a benchmark{suggest(name, options('benchmark'))}"


def _path_report(path: Path, words: list[str], overrides: list[str]) -> int:
    check_group_options(overrides)
    from clpet.evaluation.data_survey import survey_report

    text, works = survey_report(path, given_options(words))
    print(printable(text))
    return 0 if works else 2


def given_options(words: list[str]) -> dict[str, str]:
    """{full key: value} of the words KEY=VALUE."""
    pairs = [word.partition("=") for word in words]
    return {SHORT_KEYS.get(key, key): value for key, _, value in pairs}
