"""Kills runs with -9 at random moments until they are done, and compares them with runs that were left alone.

    python scripts/torture.py --rounds 20

Every round takes the next variant on a tiny model, runs `clpet train` once to its end, and once in processes that
are killed after a random time, saving included; then scores, costs and every byte of the adapters must be equal. A
process is a fork of this one, which has imported everything and composed nothing.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SMALL = ["model=tiny", "tracking=off", "hardware=cpu", "hardware.threads=1", "benchmark=files", "benchmark.task=task",
         "benchmark.max_length=24", "train.global_batch_size=4", "train.epochs=2"]  # fmt: skip
VARIANTS = [
    "method=sequential peft.dropout=0.3 train.select=best",
    "method=dynamic_conpet",
    "method=dynamic_conpet method.top_k=2 cache_dir=null train.select=best",
    "method=kif train.schedule=linear",
    "method=kif replay=share replay.share=0.5 method.replay_phase=after",
    "method=recurrent_kif replay=all",
    "method=slm",
    "method=crl",
    "method=crl replay=dynamic",
    "method=ewc",
    "method=lwf",
    "method=ea_emr replay=dynamic",
    "method=replay replay=reservoir peft=none train.lr=1e-4 train.schedule=ar",
    "method=replay replay=all method.future_labels=true train.optimizer_state=carry train.schedule=infinite",
    "method=o_lora",
    "method=gain_lora",
    "method=mocl",
    "method=sapt",
    "method=progressive_prompts",
    "method=osf",
    "method=joint",
]
WORDS = {
    "fruit": ["apple", "pear", "plum", "fig"],
    "metal": ["iron", "gold", "zinc", "tin"],
    "river": ["rhine", "nile", "oder", "elbe"],
}


def write_data(folder: Path, copies: int = 12) -> None:
    """Three tasks of four labels: a label's word, repeated."""
    folder.mkdir(parents=True)
    for split, count in (("train", copies), ("validation", 3), ("test", 3)):
        lines = [{"text": " ".join([label] * (1 + i % 3) + [f"{split}{i}"]), "label": label, "task": task}
                 for task, labels in WORDS.items() for label in labels for i in range(count)]  # fmt: skip
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def start(words: list[str], log: Path, beat: Path | None = None) -> int:
    """`clpet WORDS` in a process of its own; its number. Times of its first and last step go to the file `beat`."""
    child = os.fork()
    if child:
        return child
    if beat:
        watch(beat)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from clpet.cli import main

    sys.argv = ["clpet", *words]
    code = 1
    with contextlib.suppress(BaseException):
        code = main.main_with_errors(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)


def watch(beat: Path) -> None:
    """Has every step of this process noted: the file's text says when the first one was, its time the last one."""
    from clpet.training.fit_checkpoint import FitCheckpointer

    due = FitCheckpointer.should_save

    def noting(self: FitCheckpointer) -> bool:
        if beat.exists():
            os.utime(beat)
        else:
            beat.write_text(str(time.time()))
        return due(self)

    FitCheckpointer.should_save = noting  # type: ignore[method-assign]


def ended(child: int) -> int:
    """Waits for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def over(child: int) -> bool:
    """Whether a process has ended; it is still there to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def newest(root: Path) -> float:
    """When the last checkpoint became whole, 0 if there is none."""
    places = root.glob("*/*/s*/state/[0-9]*/state.json")
    return max((place.stat().st_mtime for place in places), default=0.0)


class Outcome:
    """What happened to one run that was killed again and again."""

    def __init__(self) -> None:
        self.kills = self.inside = self.saving = 0
        self.repeated: list[float] = []


def torment(words: list[str], root: Path, log: Path, longest: float, dice: random.Random) -> Outcome:
    """Kills and restarts the command until it is done. Raises RuntimeError when it fails by itself."""
    found, beat = Outcome(), root.with_suffix(".beat")
    while True:
        beat.unlink(missing_ok=True)
        child = start(words, log, beat)
        while not beat.exists() and dice.random() > 0.001 and not over(child):  # now and then before the first step
            time.sleep(0.01)
        time.sleep(dice.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        if code == 0:
            found.inside = log.read_text().count(", inside task")
            return found
        if code != -signal.SIGKILL:
            raise RuntimeError(f"{' '.join(words)} ended with {code}: see {log}")
        found.kills += 1
        found.saving += bool(list(root.glob(f"*/*/s*/state/.*.{child}")))
        if beat.exists():
            found.repeated.append(beat.stat().st_mtime - max(newest(root), float(beat.read_text() or "inf")))


def outcome(root: Path) -> dict[str, Any]:
    """What has to be equal: matrices, what was trained on, and every byte of what was trained.

    Validation may have to compute logits again that a killed process held in memory.
    """
    (folder,) = root.glob("*/*/s*/results.json")
    found = json.loads(folder.read_text())
    files = sorted(path for path in folder.parent.glob("[ah]*/**/*.safetensors"))
    costs = [{key: value for key, value in cost.items() if key.startswith(("forward", "backward"))}
             for cost in found["cost"]]  # fmt: skip
    return {
        **{key: found[key] for key in ("scores", "correct", "task_scores", "diagnostics")},
        "cost": costs,
        "files": {str(path.relative_to(folder.parent)): path.read_bytes() for path in files},
    }


def one_round(variant: str, place: Path, minutes: float, dice: random.Random) -> tuple[list[str], Outcome]:
    """What differs (nothing, it is hoped), and what the killed run went through."""
    args = ["train", *SMALL, *variant.split(), f"data_dir={place.parent / 'data'}", f"train.save_minutes={minutes}"]
    log, beat = place / "log.txt", place / "whole.beat"
    place.mkdir()
    if code := ended(start([*args, f"output_dir={place / 'whole'}"], log, beat)):
        raise RuntimeError(f"{variant} ended with {code}: see {log}")
    seconds = time.time() - float(beat.read_text())
    found = torment([*args, f"output_dir={place / 'cut'}"], place / "cut", place / "cut.txt", 0.5 * seconds, dice)
    whole, cut = outcome(place / "whole"), outcome(place / "cut")
    return [key for key in whole if whole[key] != cut[key]], found


def torture(rounds: int, minutes: float, seed: int, place: Path, first: int) -> int:
    """Runs the rounds; returns how many ended unequal."""

    import clpet.reporting.plots.transfer_matrix
    import clpet.run  # noqa: F401  what every child would import

    dice, equal, total = random.Random(seed), 0, Outcome()
    write_data(place / "data")
    for number in range(rounds):
        variant = VARIANTS[(first + number) % len(VARIANTS)]
        different, found = one_round(variant, place / f"{number:03d}", minutes, dice)
        equal += not different
        total.kills, total.inside = total.kills + found.kills, total.inside + found.inside
        total.saving, total.repeated = total.saving + found.saving, total.repeated + found.repeated
        verdict = f"DIFFERENT in {', '.join(different)}" if different else "equal"
        print(
            f"{number + 1:3d} {verdict:9} {found.kills:3d} kills, {found.inside:3d} resumed inside a task  {variant}",
            flush=True,
        )
        if not different:
            shutil.rmtree(place / f"{number:03d}")
    worst = max(total.repeated, default=0.0)
    print(f"{equal} of {rounds} rounds equal bit for bit; {total.kills} kills, {total.saving} of them while saving, "
          f"{total.inside} resumes inside a task; at most {worst:.2f} s of steps repeated, a checkpoint every {60 * minutes:.2f} s")  # fmt: skip
    return rounds - equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=len(VARIANTS))
    parser.add_argument("--minutes", type=float, default=0.001, help="train.save_minutes")
    parser.add_argument("--first", type=int, default=0, help="number of the first variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept where a round differs; default: a temporary one")
    arguments = parser.parse_args()
    place = arguments.folder or Path(tempfile.mkdtemp(prefix="clpet-torture-"))
    sys.exit(min(1, torture(arguments.rounds, arguments.minutes, arguments.seed, place.resolve(), arguments.first)))


if __name__ == "__main__":
    main()
