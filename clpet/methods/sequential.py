"""Sequential fine-tuning: one adapter, one head, task after task. The lower bound."""

from dataclasses import dataclass

from clpet.methods.base import Method


@dataclass
class Sequential(Method):
    """Every default of Method."""
