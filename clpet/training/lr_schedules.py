"""Learning-rate schedules: the rate of every step of a fit, given the steps of earlier tasks.

A fit has S steps, w of them warm-up, peak eta and floor eta_min. Step t = 0 .. S - 1 of the warm-up has eta t / w.
After the warm-up:
    constant   eta
    linear     eta (S - t) / (S - w)
    cosine     from eta down to eta_min
    ar         like cosine, from a peak on one cosine over the steps of all tasks so far (TiC-LM, arXiv 2504.02107)
    infinite   one schedule per run: warm-up and cosine down to eta_c in the first task, then eta_c, and in the last
               share of the last task a cosine down to eta_min (arXiv 2403.08763)
The floor would be reached at step S, one after the last.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from clpet.config.schema import Schedule, Training

log = logging.getLogger(__name__)


@dataclass
class SchedulePosition:
    """Position of a fit in the run: its steps, and the `done` steps of the same stage in earlier tasks.

    `warmed` of the `done` steps were warm-up. `last` is True in the last task.
    """

    steps: int
    done: int = 0
    warmed: int = 0
    last: bool = False


def warmup(settings: Training, position: SchedulePosition) -> int:
    """Number of warm-up steps of a fit; an infinite schedule warms up only once."""
    if settings.schedule is Schedule.infinite and position.done:
        return 0
    share = settings.max_warmup_share
    return settings.warmup_steps if share is None else min(settings.warmup_steps, int(share * position.steps))


def warn_of_warmup(settings: Training, position: SchedulePosition, stage: str) -> None:
    """Warns if a fit ends before its warm-up does, so that it never reaches its learning rate."""
    if (warm := warmup(settings, position)) >= position.steps > 0:
        log.warning(
            "a fit%s has %d steps and train.warmup_steps=%d: its learning rate stays below %.0f %% of train.lr; lower "
            "train.warmup_steps, or set train.max_warmup_share",
            stage and f" of the {stage}", position.steps, warm, 100 * position.steps / warm,
        )  # fmt: skip


def schedule(settings: Training, peak: float, position: SchedulePosition) -> Callable[[int], float]:
    """Returns the function from step t of a fit, counted from 0, to its learning rate."""
    steps, warm, floor = position.steps, warmup(settings, position), settings.lr_min
    if settings.schedule is Schedule.ar:
        peak = autoregressive_peak(peak, floor, position, warm)
    after_warmup = {
        Schedule.constant: lambda t: peak,
        Schedule.linear: lambda t: peak * max(0.0, (steps - t) / max(1, steps - warm)),
        Schedule.cosine: lambda t: cosine(peak, floor, (t - warm) / max(1, steps - warm)),
        Schedule.ar: lambda t: cosine(peak, floor, (t - warm) / max(1, steps - warm)),
        Schedule.infinite: _infinite(settings, peak, position, warm),
    }[settings.schedule]
    return lambda t: peak * (t / max(1, warm)) if t < warm else after_warmup(t)


def cosine(high: float, low: float, progress: float) -> float:
    """Cosine from `high` at progress 0 to `low` at progress 1."""
    return low + (high - low) * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def autoregressive_peak(peak: float, floor: float, position: SchedulePosition, warm: int) -> float:
    """Peak eta_k of task k under the ar schedule (TiC-LM).

    It is read at the end of this fit's warm-up from a cosine that starts at `peak` after all warm-up steps so far and
    ends with this fit.
    """
    start = position.warmed + warm
    return cosine(peak, floor, (position.done + warm - start) / max(1, position.done + position.steps - start))


def _infinite(settings: Training, peak: float, position: SchedulePosition, warm: int) -> Callable[[int], float]:
    constant = (peak + settings.lr_min) / 2 if settings.lr_constant is None else settings.lr_constant
    anneal_steps = round(settings.anneal_share * position.steps) if position.last else 0
    anneal_start = position.steps - anneal_steps

    def rate(t: int) -> float:
        if t >= anneal_start:
            return cosine(constant, settings.lr_min, (t - anneal_start) / max(1, anneal_steps))
        if position.done:
            return constant
        return cosine(peak, constant, min(1.0, (t - warm) / max(1, anneal_start - warm)))

    return rate
