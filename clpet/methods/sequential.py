"""Sequential fine-tuning of one adapter and one head, task after task, L = CE: the lower bound."""

from dataclasses import dataclass

from clpet.methods.base import Method


@dataclass
class Sequential(Method):
    """All defaults of Method."""
