"""`clpet data`: a report on a benchmark, without training."""

import argparse

from clpet.cli.options import check_group_options, split_flags
from clpet.config.compose import compose_config
from clpet.escape import printable


def data(argv: list[str]) -> int:
    """`clpet data BENCHMARK key=value ...`: a report on the data, without training."""
    description = "Counts, balance, lengths, duplicates and overlaps of a benchmark, without training."
    parser = argparse.ArgumentParser("clpet data", description=description)
    parser.add_argument("benchmark", help="an option of clpet list benchmarks")
    parser.add_argument("overrides", nargs="*", help="such as data_dir=FOLDER model=bert_base benchmark.max_train=100")
    parser.add_argument("--config-dir", help="a folder with your own YAMLs")
    arguments = parser.parse_args(argv)
    folder = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    _, overrides = split_flags([*folder, f"benchmark={arguments.benchmark}", *arguments.overrides])
    check_group_options(overrides)
    cfg = compose_config(overrides)
    from clpet.evaluation.data_inspection import report  # imports torch: only after the options are checked

    print(printable(report(cfg)))
    return 0
