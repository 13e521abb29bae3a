"""Kills runs with SIGKILL at random moments until they finish, and compares them with uninterrupted runs.

    python scripts/torture.py --rounds 20
    python scripts/torture.py --sharded --rounds 5      # two ranks with half of the weights each

Every round takes the next variant on a tiny model and runs `clpet train` twice: once without interruption, and once
in processes that are killed after a random time, also while they save. Scores, costs and every byte of the adapters
must be equal. The processes are forks of this one, which has imported everything but composed no configuration. With
`--sharded` a run is two of them, which are killed one shortly after the other.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
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
    "method=aim_merging replay=all method.interval=2 method.longest=2 method.alarm=0.01",
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
SHARDED = [
    "method=sequential peft=none train.lr=1e-4 train.select=best",
    "method=kif method.unit=matrix peft=none train.lr=1e-4 model=tiny_llama",
    "method=ewc peft=none train.lr=1e-4 train.optimizer_state=carry",
    "method=recurrent_kif replay=all peft=none train.lr=1e-4 model=tiny_llama",
    "method=replay replay=reservoir peft=none train.lr=1e-4 train.snapshot_every=1",
]
RANKS = 2  # with --sharded
WORDS = {
    "fruit": ["apple", "pear", "plum", "fig"],
    "metal": ["iron", "gold", "zinc", "tin"],
    "river": ["rhine", "nile", "oder", "elbe"],
}


def write_data(folder: Path, copies: int = 12) -> None:
    """Writes three tasks of four labels; a text repeats the word of its label."""
    folder.mkdir(parents=True)
    for split, count in (("train", copies), ("validation", 3), ("test", 3)):
        lines = [{"text": " ".join([label] * (1 + i % 3) + [f"{split}{i}"]), "label": label, "task": task}
                 for task, labels in WORDS.items() for label in labels for i in range(count)]  # fmt: skip
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def start_all(words: list[str], log: Path, beat: Path) -> list[int]:
    """Starts `clpet WORDS` in a fork, or one per rank if it shards; returns their process ids."""
    if "hardware.shard=true" not in words:
        return [start(words, log, beat)]
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(words, log, beat if rank == 0 else None, {**group, "RANK": rank, "LOCAL_RANK": rank})
            for rank in range(RANKS)]  # fmt: skip


def start(words: list[str], log: Path, beat: Path | None, variables: dict[str, Any] | None = None) -> int:
    """Starts `clpet WORDS` in a fork; returns its process id. `beat` gets the times of its first and last step.

    `variables` are those of a launcher of ranks.
    """
    child = os.fork()
    if child:
        return child
    os.environ.update({name: str(value) for name, value in (variables or {}).items()})
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
    """Records the steps of this process: the first one as the text of the file, the last one as its modification time."""
    from clpet.training.fit_checkpoint import FitCheckpointer

    due = FitCheckpointer.should_save

    def noting(self: FitCheckpointer) -> bool:
        if beat.exists():
            os.utime(beat)
        else:
            beat.write_text(str(time.time()))
        return due(self)

    FitCheckpointer.should_save = noting  # type: ignore[method-assign]


def wait_for(child: int) -> int:
    """Waits for a process; returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def has_ended(child: int) -> bool:
    """Whether a process has ended; `wait_for` can still be called."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def newest(root: Path) -> float:
    """The time of the last complete checkpoint, 0 if there is none."""
    paths = root.glob("*/*/s*/state/[0-9]*/state.json")
    return max((path.stat().st_mtime for path in paths), default=0.0)


class Interruptions:
    """Counts of one run that was killed repeatedly."""

    def __init__(self) -> None:
        self.kills = self.inside_tasks = self.while_saving = 0  # inside_tasks: resumed inside a task
        self.repeated: list[float] = []  # seconds of training lost by each kill


def torment(words: list[str], root: Path, log: Path, longest: float, dice: random.Random) -> Interruptions:
    """Kills and restarts the command until it finishes. Raises RuntimeError if it fails by itself."""
    counts, beat = Interruptions(), root.with_suffix(".beat")
    while True:
        beat.unlink(missing_ok=True)
        children = start_all(words, log, beat)
        # Wait for the first step, but now and then kill before it.
        while not beat.exists() and dice.random() > 0.001 and not has_ended(children[0]):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, longest))
        codes = kill(children, dice)
        if set(codes) == {0}:
            counts.inside_tasks = log.read_text().count(", inside task")
            return counts
        if -signal.SIGKILL not in codes:
            raise RuntimeError(f"{' '.join(words)} ended with {codes}: see {log}")
        counts.kills += 1
        counts.while_saving += bool(list(root.glob(f"*/*/s*/state/.*.{children[0]}*")))
        if beat.exists():
            counts.repeated.append(beat.stat().st_mtime - max(newest(root), float(beat.read_text() or "inf")))


def kill(children: list[int], dice: random.Random) -> list[int]:
    """Kills the ranks of a run one shortly after the other, in any order; returns their exit codes."""
    for child in dice.sample(children, len(children)):
        if not has_ended(child):
            os.kill(child, signal.SIGKILL)
        time.sleep(dice.uniform(0, 0.05) if len(children) > 1 else 0)
    return [wait_for(child) for child in children]


def outcome(root: Path) -> dict[str, Any]:
    """The parts of a run that must be equal: matrices, trained examples, and every byte of the trained weights.

    Costs of evaluation are left out: logits that a killed process had in memory are computed again.
    """
    (path,) = root.glob("*/*/s*/results.json")
    results = json.loads(path.read_text())
    files = sorted(file for file in path.parent.glob("[ah]*/**/*.safetensors"))
    costs = [{key: value for key, value in cost.items() if key.startswith(("forward", "backward"))}
             for cost in results["cost"]]  # fmt: skip
    return {
        **{key: results[key] for key in ("scores", "correct", "task_scores", "diagnostics")},
        "cost": costs,
        "files": {str(file.relative_to(path.parent)): file.read_bytes() for file in files},
    }


def one_round(
    variant: str, folder: Path, minutes: float, dice: random.Random, sharded: bool
) -> tuple[list[str], Interruptions]:
    """The names of differing parts, none if all is well, and the counts of the killed run."""
    args = [
        "train",
        *(["hardware.shard=true"] if sharded else []),
        *SMALL,
        *variant.split(),
        f"data_dir={folder.parent / 'data'}",
        f"train.save_minutes={minutes}",
    ]
    log, beat = folder / "log.txt", folder / "whole.beat"
    folder.mkdir()
    codes = [wait_for(child) for child in start_all([*args, f"output_dir={folder / 'whole'}"], log, beat)]
    if any(codes):
        raise RuntimeError(f"{variant} ended with {codes}: see {log}")
    seconds = time.time() - float(beat.read_text())
    counts = torment([*args, f"output_dir={folder / 'cut'}"], folder / "cut", folder / "cut.txt", 0.5 * seconds, dice)
    whole, cut = outcome(folder / "whole"), outcome(folder / "cut")
    return [key for key in whole if whole[key] != cut[key]], counts


def torture(rounds: int, minutes: float, seed: int, folder: Path, first: int, sharded: bool) -> int:
    """Runs the rounds; returns the number of rounds whose runs differ."""

    import clpet.reporting.plots.transfer_matrix
    import clpet.run  # noqa: F401  imported once here instead of in every fork

    dice, equal, total = random.Random(seed), 0, Interruptions()
    write_data(folder / "data")
    for number in range(rounds):
        variants = SHARDED if sharded else VARIANTS
        variant = variants[(first + number) % len(variants)]
        different, counts = one_round(variant, folder / f"{number:03d}", minutes, dice, sharded)
        equal += not different
        total.kills, total.inside_tasks = total.kills + counts.kills, total.inside_tasks + counts.inside_tasks
        total.while_saving, total.repeated = total.while_saving + counts.while_saving, total.repeated + counts.repeated
        verdict = f"DIFFERENT in {', '.join(different)}" if different else "equal"
        print(
            f"{number + 1:3d} {verdict:9} {counts.kills:3d} kills, {counts.inside_tasks:3d} resumed inside a task  {variant}",
            flush=True,
        )
        if not different:
            shutil.rmtree(folder / f"{number:03d}")
    worst = max(total.repeated, default=0.0)
    print(f"{equal} of {rounds} rounds equal bit for bit; {total.kills} kills, {total.while_saving} of them while saving, "
          f"{total.inside_tasks} resumes inside a task; at most {worst:.2f} s of steps repeated, a checkpoint every {60 * minutes:.2f} s")  # fmt: skip
    return rounds - equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="default: every variant once")
    parser.add_argument("--sharded", action="store_true", help="two ranks, each with half of the weights")
    parser.add_argument("--minutes", type=float, default=0.001, help="train.save_minutes")
    parser.add_argument("--first", type=int, default=0, help="number of the first variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="not removed if a round differs; default: a temporary folder")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="clpet-torture-"))
    rounds = arguments.rounds or len(SHARDED if arguments.sharded else VARIANTS)
    options = arguments.minutes, arguments.seed, folder.resolve(), arguments.first, arguments.sharded
    sys.exit(min(1, torture(rounds, *options)))


if __name__ == "__main__":
    main()
