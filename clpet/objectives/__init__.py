"""What a model is asked to do. `load` gives the class of an objective by its name."""

import importlib
from typing import Any

PLACES = {
    "classification": "clpet.objectives.classification.Classification",
    "language_modeling": "clpet.objectives.language_modeling.LanguageModeling",
    "text_to_text": "clpet.objectives.text_to_text.TextToText",
}


def load(name: str) -> Any:
    """The objective's class, imported when it is needed."""
    module, _, kind = PLACES[name].rpartition(".")
    return getattr(importlib.import_module(module), kind)
