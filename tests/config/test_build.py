"""Objects built from configuration nodes: class paths of earlier versions."""

import pytest

from clpet.config.build import MOVED_CLASSES, build, find_class, parse_config
from clpet.config.compose import compose_config
from clpet.errors import ConfigError


@pytest.mark.parametrize("old", MOVED_CLASSES)
def test_class_paths_of_version_0_1_0_still_open(old: str) -> None:
    module, _, name = MOVED_CLASSES[old].rpartition(".")
    cls = find_class(old, "group")
    assert (cls.__name__, cls.__module__.startswith(module)) == (name, True)


def test_an_old_yaml_builds_the_same_object_as_a_new_one() -> None:
    values = {"name": "dynamic", "ratio": 0.5}
    old, new = (
        build({"_target_": target, **values}, "replay")
        for target in ("clpet.memory.DynamicReplay", MOVED_CLASSES["clpet.memory.DynamicReplay"])
    )
    assert (type(old), vars(old)) == (type(new), vars(new))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=a", "seed must be an integer, not a"),
        ("seed=1.5", "seed must be an integer, not 1.5"),
        ("train.clip=x", "train.clip must be a number, not x"),
        ("fresh=maybe", "fresh must be true or false, not maybe"),
        ("train.betas=3", "train.betas must be a list, such as [a,b]"),
        ("train.select=first", "train.select must be one of last, best, not first"),
        ("train.clip=null", "train.clip must have a value, not null"),
    ],
)
def test_a_value_of_a_wrong_type_is_one_line_in_plain_words(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(compose_config([word]))
    assert str(error.value) == message
