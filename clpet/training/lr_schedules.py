"""Learning rates: what one step of a fit is trained at, from where the fit stands in the run.

S steps, w of them warm-up, peak eta, floor eta_min. Step t = 0 .. S - 1 of the warm-up has eta t / w; after it
    constant   eta
    linear     eta (S - t) / (S - w)
    cosine     from eta to eta_min
    ar         a cosine whose peak lies on one cosine over all steps so far (TiC-LM, arXiv 2504.02107)
    infinite   once a run: warm-up, cosine down to eta_c in the first task, eta_c, and cosine down to eta_min over the
               last share of the last task (arXiv 2403.08763)
The floor is reached at step S, the first that is not taken.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from clpet.config.schema import Schedule, Training

log = logging.getLogger(__name__)


@dataclass
class SchedulePosition:
    """Where a fit stands: its steps, those of the same stage in the tasks before it, and whether it is the last task's.

    `warmed` are the warm-up steps among `done`.
    """

    steps: int
    done: int = 0
    warmed: int = 0
    last: bool = False


def warmup(settings: Training, position: SchedulePosition) -> int:
    """Warm-up steps of a fit; an infinite schedule warms up once."""
    if settings.schedule is Schedule.infinite and position.done:
        return 0
    share = settings.warmup_share
    return settings.warmup_steps if share is None else min(settings.warmup_steps, int(share * position.steps))


def warn_of_warmup(settings: Training, position: SchedulePosition, stage: str) -> None:
    """Warns of a fit that ends inside its warm-up and so never trains at its learning rate."""
    if (warm := warmup(settings, position)) >= position.steps > 0:
        log.warning(
            "a fit%s has %d steps and train.warmup_steps=%d: its learning rate stays below %.0f %% of train.lr; lower "
            "train.warmup_steps, or set train.warmup_share",
            stage and f" of the {stage}", position.steps, warm, 100 * position.steps / warm,
        )  # fmt: skip


def schedule(settings: Training, peak: float, position: SchedulePosition) -> Callable[[int], float]:
    """The learning rate of step t of a fit, counted from 0."""
    steps, warm, floor = position.steps, warmup(settings, position), settings.lr_min
    if settings.schedule is Schedule.ar:
        peak = autoregressive_peak(peak, floor, position, warm)
    after = {
        Schedule.constant: lambda t: peak,
        Schedule.linear: lambda t: peak * max(0.0, (steps - t) / max(1, steps - warm)),
        Schedule.cosine: lambda t: cosine(peak, floor, (t - warm) / max(1, steps - warm)),
        Schedule.ar: lambda t: cosine(peak, floor, (t - warm) / max(1, steps - warm)),
        Schedule.infinite: _infinite(settings, peak, position, warm),
    }[settings.schedule]
    return lambda t: peak * (t / max(1, warm)) if t < warm else after(t)


def cosine(high: float, low: float, progress: float) -> float:
    """From `high` at 0 to `low` at 1."""
    return low + (high - low) * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def autoregressive_peak(peak: float, floor: float, position: SchedulePosition, warm: int) -> float:
    """eta_k: where a cosine from `peak`, after all warm-up, to the end of this fit stands at its own warm-up's end."""
    start = position.warmed + warm
    return cosine(peak, floor, (position.done + warm - start) / max(1, position.done + position.steps - start))


def _infinite(settings: Training, peak: float, position: SchedulePosition, warm: int) -> Callable[[int], float]:
    held = (peak + settings.lr_min) / 2 if settings.lr_constant is None else settings.lr_constant
    anneal = round(settings.anneal_share * position.steps) if position.last else 0
    flat = position.steps - anneal  # where the anneal begins

    def rate(t: int) -> float:
        before = held if position.done else cosine(peak, held, min(1.0, (t - warm) / max(1, flat - warm)))
        return before if t < flat else cosine(held, settings.lr_min, (t - flat) / max(1, anneal))

    return rate
