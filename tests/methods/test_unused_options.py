"""Options that are set but have no effect are named before a run begins."""

import logging

import pytest
from rich.console import Console

from clpet.methods.unused_options import unused_options
from clpet.reporting.progress import Display
from clpet.run import announce

CASES = {
    "method=derpp replay.ratio=3 replay.limit=20": [
        "replay.ratio=3.0 has no effect: method=derpp draws old examples itself",
        "replay.limit=20 has no effect: method=derpp draws old examples itself",
    ],
    "method=merge method.rule=ties method.keep=0.3 method.drop=0.9": [
        "method.drop=0.9 has no effect: it is not for method.rule=ties"
    ],
    "method=fusion method.mode=scalar method.size=8": [
        "method.size=8 has no effect: method.mode=scalar has no queries and keys"
    ],
    "method=seq_star method.scale=1": [],
    "method=seq_star method.scale=1 replay=reservoir": [
        "method.scale=1.0 has no effect: it is the factor of cosines, and the head is linear"
    ],
    "method=bic method.distil=false method.temperature=1": [
        "method.temperature=1.0 has no effect: it is that of the distillation, and method.distil=false"
    ],
    "method=merge method.rule=dare method.trim=faithful": [
        "method.trim=faithful has no effect: it is not for method.rule=dare"
    ],
}


@pytest.mark.parametrize(
    "options", [pytest.param(options, marks=pytest.mark.slow if i > 1 else []) for i, options in enumerate(CASES)]
)
def test_an_option_without_effect_is_named_unless_it_has_its_default(options: str, make) -> None:
    assert unused_options(make(*options.split()).method) == CASES[options]


def test_a_run_says_so_before_it_begins(make, caplog: pytest.LogCaptureFixture) -> None:
    run = make("method=wa", "method.distil=false", "method.temperature=1")
    with caplog.at_level(logging.WARNING):
        announce(Display(Console(quiet=True), 3), run.session)
    assert "method.temperature=1.0 has no effect" in caplog.text
