"""Objects built from configuration nodes: class paths of earlier versions."""

import pytest

from clpet.config.build import MOVED_CLASSES, build, find_class


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
