"""Turns the errors of Hydra, OmegaConf, SLURM and the disk into one line. Imports no torch."""

import errno
import os
import re
import shlex
import sys
import tempfile
import traceback
from pathlib import Path

from clpet.config.compose import CONFIG_GROUPS, compose_config, plugin_dirs
from clpet.config.overrides import quote
from clpet.config.renamed import renamed_message
from clpet.errors import ClpetError, suggest
from clpet.escape import inline
from clpet.runtime.launchers import report_error
from clpet.runtime.signals import EXIT_TEMPFAIL, Interrupted

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def hydra_message(error: BaseException) -> str | None:
    """One line for an error in the command line or a YAML that Hydra or OmegaConf found; None for any other error."""
    from hydra.errors import HydraException, OverrideParseException  # keeps Hydra out of `clpet --help`
    from omegaconf.errors import OmegaConfBaseException

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:  # causes and contexts can form a circle
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:  # an error of clpet, raised in a resolver for example, says more than Hydra's wrapper
        if isinstance(link, ClpetError):
            return str(link)
    if not any(isinstance(link, HydraException | OmegaConfBaseException) for link in chain):
        return None
    text = str(error).strip()
    for link in chain:
        if isinstance(link, OverrideParseException):
            return f"cannot parse {link.override}: {link.message.splitlines()[0]}{quoting_hint(str(link.override))}"
    return _known_message(text) or (text.splitlines()[0] if text else type(error).__name__)


def _known_message(text: str) -> str | None:
    """clpet's own words for the most common messages of Hydra."""
    if "Ambiguous value" in text:
        return f"{text.splitlines()[0].rstrip('.')}: to sweep over the values, add -m"
    append = re.search(r"To append to your config use (\+(\S+?)=\{.*)", text)
    if append:
        return f"{append[2]} has no such entries yet; add them with {shell_word(append[1])}"
    missing = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if missing:
        key = missing[1]
        return renamed_message(key) or f"unknown key {key}{suggest_key(key)}"
    return None


def quoting_hint(word: str) -> str:
    """A hint with the value quoted for Hydra and for the shell; empty where the value is meant as a list or dict."""
    key, equals, value = word.partition("=")
    if not equals or value[:1] in "[\"'" or re.match(r"\{\s*[\w'\"-]+\s*:", value):
        return ""
    return f"; quote a text with such characters twice: {shell_word(f'{key}={quote(value)}')}"


def shell_word(word: str) -> str:
    """A word with the quotes that a shell needs."""
    return shlex.quote(word) if set('"$`\\!') & set(word) else f'"{word}"'


def cluster_message(error: BaseException) -> str | None:
    """One line for an error of SLURM or submitit: a rejected submission or a lost job; None for any other error."""
    if 'Could not detect "srun"' in str(error):
        return "SLURM is not installed on this machine: submit from a login node, or use hardware=auto"
    if not type(error).__module__.startswith("submitit."):
        return None
    return f"SLURM: {' '.join(str(error).splitlines()[:2])}; re-run the same command to submit the missing runs"


def disk_message(error: BaseException) -> str | None:
    """One line for a full disk, also where a library reports it in its own words; None for any other error."""
    if "No space left on device" not in str(error) and getattr(error, "errno", None) not in DISK_FULL:
        return None
    path = getattr(error, "filename", None)
    return f"the disk is full{f' at {path}' if path else ''}: free some space, then re-run the same command to resume"


def plugin_location(error: BaseException) -> str | None:
    """FILE:LINE of the innermost frame in a --config-dir; None where no code of the user is involved."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((Path(error.filename), error.lineno))
    for path, line in reversed(frames):
        if any(path.is_relative_to(folder) for folder in plugin_dirs()):
            return f"{path}:{line}"
    return None


def suggest_key(key: str) -> str:
    """A suggestion among the keys of the configuration with the groups that are set on the command line."""
    from omegaconf import DictConfig, OmegaConf

    choices = [word for word in sys.argv[1:] if word.partition("=")[0] in CONFIG_GROUPS and "," not in word]
    try:
        cfg = compose_config(choices)
    except Exception:  # the other words may be wrong too; the unknown key is the error that is reported
        return ""
    keys: list[str] = []

    def walk(node: DictConfig, prefix: str) -> None:
        for name in map(str, node):
            keys.append(f"{prefix}{name}")
            child = OmegaConf.select(node, name)
            if isinstance(child, DictConfig):
                walk(child, f"{prefix}{name}.")

    walk(cfg, "")
    keys = [name for name in keys if name.rpartition(".")[2] not in ("_target_", "name")]
    last = key.rpartition(".")[2]
    same_ending = [name for name in keys if name.endswith((f".{last}", f"_{last}"))]
    if same_ending:  # lr for train.lr, batch_size for train.global_batch_size; train's keys and short ones first
        best = min(same_ending, key=lambda name: (not name.startswith("train."), name.count("."), name))
        return f"; did you mean {best}?"
    suggestion = suggest(key, keys)
    if suggestion.startswith("; did"):
        return suggestion
    parent = key.rpartition(".")[0]
    return suggest(key, [name for name in keys if name.rpartition(".")[0] == parent])


def format_error(error: Exception | Interrupted) -> tuple[str, int]:
    """(one line, exit code) of an error; the traceback of an unexpected one goes to a temporary file.

    Exit codes: 2 for wrong input, 1 for a failure of the machine or of a program, 75 after a signal.
    """
    if isinstance(error, ClpetError):
        return str(error), error.exit_code
    if isinstance(error, Interrupted):
        return str(error), EXIT_TEMPFAIL
    for message, code in ((disk_message(error), 1), (hydra_message(error), 2), (cluster_message(error), 1)):
        if message is not None:
            return message, code
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: torch is not imported here
        hint = "lower hardware.micro_batch_size (training) or hardware.eval_batch_size (evaluation)"
        return f"the device is out of memory: {hint}; finished tasks are saved", 1
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}", 2
    if os.environ.get("CLPET_DEBUG"):
        raise error
    with tempfile.NamedTemporaryFile("w", prefix="clpet-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    text = (str(error).splitlines() or [""])[0]
    if location := plugin_location(error):
        return f"{location}: {type(error).__name__}: {text} (full traceback: {file.name})", 1
    return f"internal error, please report it with {file.name}: {type(error).__name__}: {text}", 1


def print_error(message: str, code: int) -> int:
    """Prints `clpet: MESSAGE` in one line to stderr and returns the exit code."""
    line = inline(" ".join(message.split()))
    report_error(line, code)
    print(f"clpet: {line}", file=sys.stderr)
    return code
