"""Checks the hooks of a method's class when it is defined: a misspelt hook would never be called, without an error."""

import difflib
import inspect

from clpet.errors import ConfigError

STEP_HOOKS = ("before_step", "loss", "step_loss", "adjust_gradients", "after_step", "end_step")
RENAMED = {"after_batch": "end_step", "first_adapter": "init_adapters", "measured": "evaluable_tasks"}
SIMILAR = 0.82  # ratio of difflib from which a name counts as a misspelt one; "losses" and "loss" have 0.8


def check_hooks(cls: type, base: type) -> None:
    """Raises ConfigError for a function of `cls` whose name resembles one of `base`, or that takes no context."""
    if "objectives" in vars(cls):
        raise ConfigError(
            f"{cls.__module__}.{cls.__name__}.objectives has no effect: declare what the method needs with "
            "needs_labels, needs_plain_text, supports_plain_text or needs_logits (clpet/methods/base.py)"
        )
    hooks = [name for name, value in vars(base).items() if inspect.isfunction(value) and not name.startswith("_")]
    inherited = {name for parent in cls.__mro__[1:] for name in vars(parent)}
    for name, value in vars(cls).items():
        if not inspect.isfunction(value) or name.startswith("_"):
            continue
        if name not in inherited:
            similar = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name, hooks, 1, SIMILAR)
            if similar:
                raise ConfigError(
                    f"{cls.__module__}.{cls.__name__}.{name} is not a hook and is never called: "
                    f"did you mean {similar[0]}? (if it is a helper, give it a name that resembles no hook, or _{name})"
                )
        if name in STEP_HOOKS and len(inspect.signature(value).parameters) < 2:
            raise ConfigError(
                f"{cls.__module__}.{cls.__name__}.{name} takes no step: define it as {name}(self, context), "
                "with the StepContext of clpet/training/step.py"
            )
