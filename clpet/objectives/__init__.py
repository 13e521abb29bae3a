"""Training objectives. `load` returns the class of an objective by its name."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clpet.objectives.base import Objective

CLASS_PATHS = {
    "classification": "clpet.objectives.classification.Classification",
    "language_modeling": "clpet.objectives.language_modeling.LanguageModeling",
    "text_to_text": "clpet.objectives.text_to_text.TextToText",
}


def load(name: str) -> "type[Objective]":
    """The class of an objective, imported only when it is needed."""
    module, _, class_name = CLASS_PATHS[name].rpartition(".")
    cls: type[Objective] = getattr(importlib.import_module(module), class_name)
    return cls
