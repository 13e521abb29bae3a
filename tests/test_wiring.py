"""Session: one wiring for runs, loaded runs, tests and benches; nothing that it is given is changed afterwards."""

import dataclasses

import pytest

from clpet.config.build import parse_config
from clpet.config.compose import compose_config
from clpet.wiring import Components
from tests.conftest import tiny_args


def test_a_benchmark_is_never_changed(words) -> None:
    """What method and model require is set in copies: softmax, reserved positions, the length that fits."""
    words_ = tiny_args(words, "method=progressive_prompts", "method.length=3", "benchmark.max_length=600")
    components = Components.build(parse_config(compose_config(words_)))
    loaded = components.source.load(components.config.data_dir)
    settled = components.settle(loaded, length_set=False)
    objective = components.load_objective(settled)
    assert (loaded.per_task_softmax, loaded.reserved_positions, loaded.max_length) == (False, 0, 600)
    assert (settled.per_task_softmax, settled.reserved_positions, settled.max_length) == (True, 9, 600)
    assert objective.benchmark.max_length == 512 - 9
    with pytest.raises(dataclasses.FrozenInstanceError):
        settled.max_length = 503
    with pytest.raises(dataclasses.FrozenInstanceError):
        settled.tasks[0].metric = "rouge_l"
