"""Checks and measures clpet on one GPU in at most ten minutes, with random weights of real shapes.

    python scripts/gpu_check.py                 all parts; writes gpu_check.json and gpu_check.md
    python scripts/gpu_check.py --only lora     one part
    python scripts/gpu_check.py --tiny          tiny shapes, on a CPU too: whether the script works, not how fast clpet is

It needs torch with CUDA, what clpet itself needs (transformers, peft, hydra-core, ...) and, for the tests, pytest.
Nothing is downloaded: configurations are in scripts/gpu_parts.py, weights and texts are random.

    lora       LoRA of rank 16 on all projections of an 8B LLaMA, windows of 4,096 tokens; eager, compiled, and with
               the kernels of Liger where they are installed
    full       full fine-tuning of a 1.7B model, fp32 weights, products in bf16; in the same ways
    methods    three tasks of labels on a 1B LLaMA: sequential, kif and dynamic_conpet
    generate   2,000 answers of 64 tokens, 1B LLaMA
    tests      pytest -m gpu

Every part but the last runs clpet and a hand-written loop of PyTorch, transformers and peft one after the other, each
part in a process of its own. The exit code is 1 if a part fails, if a loss does not fall or if a test fails; what does
not fit into the time is named. FLOPs are those of the model by the formula in `flops_per_token` (scripts/gpu_parts.py).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TOTAL = 570  # seconds for all parts
SECONDS = {"lora": 170, "full": 100, "methods": 110, "generate": 100, "tests": TOTAL}  # the tests get what is left
NEEDED = ("torch", "transformers", "peft", "hydra", "hydra_plugins", "omegaconf", "numpy", "pyarrow", "safetensors",
          "rich", "jinja2", "mpmath", "psutil", "clpet")  # fmt: skip
FOR_TESTS = ("pytest", "hypothesis", "matplotlib")
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Outcome:
    """What became of a part: `status` is done, failed or out of time."""

    status: str
    seconds: float
    reason: str = ""
    rows: list[dict] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def work(name: str, tiny: bool, deadline: float, out: Path) -> None:
    """Runs a part; the body of its process."""
    import torch
    from gpu_parts import SIZES, TINY_SIZES, Part

    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names that peft uses

    from clpet.training.trainer import quiet_libraries

    parts = measurements()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    part = Part(name, (TINY_SIZES if tiny else SIZES)[name], device, deadline, out)
    try:
        with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
            parts[name](part, Path(folder))
    except Exception as error:
        traceback.print_exc()
        part.record(error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def measurements() -> dict[str, Callable]:
    """The parts that run in a process of their own."""
    import gpu_tasks
    import gpu_training

    return {"lora": gpu_training.lora, "full": gpu_training.full, "methods": gpu_tasks.methods,
            "generate": gpu_tasks.generate}  # fmt: skip


def run_part(name: str, tiny: bool, seconds: float, folder: Path) -> Outcome:
    """A part in a process of its own, which is killed when its time is over.

    A new process: one that is forked cannot use CUDA if its parent has touched it. Only tiny parts on a CPU are forks,
    since the imports would take longer than they do.
    """
    start, out = time.time(), folder / f"{name}.jsonl"
    context = multiprocessing.get_context("fork" if tiny and not has_gpu() else "spawn")
    process = context.Process(target=work, args=(name, tiny, start + seconds, out))
    process.start()
    process.join(seconds)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    outcome = Outcome("done", time.time() - start)
    outcome.rows = [record["row"] for record in records if "row" in record]
    outcome.left_out = [record["left_out"] for record in records if "left_out" in record]
    errors = [record["error"] for record in records if "error" in record]
    if late:
        outcome.status, outcome.reason = "out of time", f"stopped after {seconds:.0f} s"
    elif errors or process.exitcode:
        outcome.status = "failed"
        outcome.reason = (errors or [f"its process ended with code {process.exitcode}"])[0]
    elif flat := [row["contender"] for row in outcome.rows if row["losses"] and not falls(*row["losses"])]:
        outcome.status, outcome.reason = "failed", f"the loss does not fall: {', '.join(flat)}"
    elif not outcome.rows:
        outcome.status, outcome.reason = "out of time", "nothing was measured"
    return outcome


def has_gpu() -> bool:
    """Whether this machine has a CUDA device; does not start CUDA, which a forked process could not use then."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    return torch.cuda.is_available()


def falls(first: float, last: float) -> bool:
    """Whether a mean loss has fallen; False for NaN."""
    return last < first


def run_tests(tiny: bool, seconds: float) -> Outcome:
    """The tests that need a GPU; with `tiny` they are only collected."""
    if absent := not_installed(FOR_TESTS):
        return Outcome("failed", 0.0, absent)
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") and not tiny else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *workers, *files]
    start = time.time()
    try:
        done = subprocess.run(
            [*command, *["--collect-only"] * tiny], cwd=ROOT, text=True, capture_output=True, timeout=seconds,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        ran = re.findall(r"\[ *(\d+%)\]", (late.stdout or b"").decode())
        return Outcome("out of time", time.time() - start, f"stopped after {seconds:.0f} s, {(ran or ['0%'])[-1]} run")
    lines = [line for line in done.stdout.splitlines() if line.strip()] or [done.stderr.strip()[-300:]]
    for line in lines[-60:] if done.returncode else ():
        print(line)
    failed = [line.split(" - ")[0].removeprefix("FAILED ") for line in lines if line.startswith("FAILED")]
    reason = lines[-1].strip("= ") + "".join(f"; {name}" for name in failed[:5])
    return Outcome("failed" if done.returncode else "done", time.time() - start, reason)


def not_installed(packages: Sequence[str]) -> str:
    """One line about those of the packages that cannot be imported; '' if all can."""
    absent = [name for name in packages if not importlib.util.find_spec(name)]
    return f"missing packages: {', '.join(absent)} (pip install -e '.[all,dev]' in {ROOT})" if absent else ""


def missing(tiny: bool) -> str:
    """What this machine lacks, in one line; '' if it lacks nothing."""
    if absent := not_installed(NEEDED):
        return absent
    if not tiny and not has_gpu():
        import torch

        built = f"torch {torch.__version__} " + ("sees none" if torch.version.cuda else "is built without CUDA")
        return f"a CUDA device is needed, and {built}: --tiny runs on a CPU"
    return ""


# Tables

HEADER = [
    "contender",
    "seconds",
    "tokens/s",
    "TFLOP/s",
    "share of peak",
    "peak GiB",
    "loss",
    "against",
    "ratio",
    "note",
]


def cells(row: dict, rows: list[dict], peak: float | None) -> list[str]:
    """One line of a part's table; the ratio is that of tokens per second, above 1 if the contender is faster."""
    speed = row["tokens"] / row["seconds"]
    flops = speed * row["flops_per_token"] if row["flops_per_token"] else None
    other = next((other for other in rows if other["contender"] == row["against"]), None)
    ratio = speed / (other["tokens"] / other["seconds"]) if other and other is not row else None
    losses = "{:.2f} -> {:.2f}".format(*row["losses"]) if row["losses"] else ""
    values = [(row["seconds"], ".2f"), (speed, ",.0f"), (flops and flops / 1e12, ".1f"),
              (flops and peak and 100 * flops / peak, ".1f"), (row["memory_gib"], ".1f")]  # fmt: skip
    numbers = ["" if value is None else format(value, spec) for value, spec in values]
    numbers[3] += " %" if numbers[3] else ""
    against = [row["against"], f"{ratio:.2f}"] if ratio else ["", ""]
    return [row["contender"], *numbers, losses, *against, row["note"]]


def markdown(report: dict) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"# GPU check: {report['machine']}", "", f"`{report['command']}`, {report['date']}; {versions}", ""]
    for name, part in report["parts"].items():
        lines += [f"## {name}: {part['status']}, {part['seconds']:.0f} s", ""]
        lines += [part["reason"], ""] if part["reason"] else []
        lines += [f"Did not fit into the time: {', '.join(part['left_out'])}", ""] if part["left_out"] else []
        if part["rows"]:
            table = [HEADER, ["---", *["---:"] * 5, "---", "---", "---:", "---"]]
            table += [cells(row, part["rows"], report["peak_flops"]) for row in part["rows"]]
            lines += [*("| " + " | ".join(values) + " |" for values in table), ""]
        if name == "lora" and part["rows"]:
            lines += [report["published_lora"], ""]
    return "\n".join(lines)


def report_of(outcomes: dict[str, Outcome], machine: str, words: list[str]) -> dict:
    """Everything that was measured, as JSON."""
    from gpu_parts import PEAKS, PUBLISHED_LORA

    names = ("torch", "transformers", "peft")
    figures = "{tokens_per_s:,.0f} tokens/s, {tflops:.0f} TFLOP/s".format(**PUBLISHED_LORA)
    flops = 1e3 * PUBLISHED_LORA["tflops"] / PUBLISHED_LORA["tokens_per_s"]
    return {
        "machine": machine,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python scripts/gpu_check.py", *words]),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "peak_flops": next((peak for card, peak in PEAKS.items() if card in machine), None),
        "published_lora": f"Best public figure for such a run on one H100: {figures} ({flops:.1f} GFLOP a token).",
        "parts": {name: vars(outcome) for name, outcome in outcomes.items()},
    }


def machine() -> str:
    """The name of the card, or the number of CPU cores; asked for at the end, since CUDA takes memory of the card."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def main(words: list[str]) -> int:
    """Runs the parts and writes the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECONDS, help="run one part")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; the tests are only collected")
    parser.add_argument("--out", default="gpu_check", help="files to write, without .json and .md")
    arguments = parser.parse_args(words)
    if lack := missing(arguments.tiny):
        print(f"gpu_check: {lack}", file=sys.stderr)
        return 1
    if arguments.tiny:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling for a CPU takes half a minute
        if not has_gpu():
            measurements()  # imports, once for all forks
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # models of several sizes, one by one
    names, end = [arguments.only] if arguments.only else list(SECONDS), time.time() + TOTAL
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            seconds = min(SECONDS[name], end - time.time())
            if name == "tests":
                outcomes[name] = run_tests(arguments.tiny, seconds)
            else:
                outcomes[name] = run_part(name, arguments.tiny, seconds, Path(folder))
            print(
                f"{name}: {outcomes[name].status}, {outcomes[name].seconds:.0f} s. {outcomes[name].reason}", flush=True
            )
        report = report_of(outcomes, machine(), words)
    Path(f"{arguments.out}.json").write_text(json.dumps(report, indent=2) + "\n")
    Path(f"{arguments.out}.md").write_text(markdown(report) + "\n")
    print(markdown(report))
    failed = [f"{name}: {outcome.reason}" for name, outcome in outcomes.items() if outcome.status == "failed"]
    for reason in failed:
        print(f"gpu_check: failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
