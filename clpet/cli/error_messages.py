"""What Hydra, OmegaConf, SLURM and the disk say of mistakes, put into one line. Imports no torch."""

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
from clpet.runtime.signals import EXIT_TEMPFAIL, Interrupted

FULL = (errno.ENOSPC, errno.EDQUOT)


def hydra_message(error: BaseException) -> str | None:
    """One line for the mistakes Hydra and OmegaConf find in what was typed; None for anything else."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, ClpetError):
            return str(link)
    if not any(isinstance(link, HydraException | OmegaConfBaseException) for link in chain):
        return None
    text = str(error).strip()
    broken = next((link for link in chain if isinstance(link, OverrideParseException)), None)
    if broken is not None:
        return f"cannot read {broken.override}: {broken.message.splitlines()[0]}{quoting(str(broken.override))}"
    if "Ambiguous value" in text:
        return f"{text.splitlines()[0].rstrip('.')}: to sweep over the values, add -m"
    append = re.search(r"To append to your config use (\+(\S+?)=\{.*)", text)
    if append:
        return f"{append[2]} has no such entries yet; to add them say {shell_word(append[1])}"
    missing = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if missing:
        key = missing[1]
        return renamed_message(key) or f"unknown key {key}{suggest_key(key)}"
    return text.splitlines()[0] if text else type(error).__name__


def quoting(word: str) -> str:
    """The same word with its value quoted for Hydra and for the shell, unless the value is meant as a list or dict."""
    key, equals, value = word.partition("=")
    if not equals or value[:1] in "[\"'" or re.match(r"\{\s*[\w'\"-]+\s*:", value):
        return ""
    return f"; a text with such signs is quoted twice: {shell_word(f'{key}={quote(value)}')}"


def shell_word(word: str) -> str:
    """A word as it is typed in a shell."""
    return shlex.quote(word) if set('"$`\\!') & set(word) else f'"{word}"'


def cluster_message(error: BaseException) -> str | None:
    """One line for what SLURM or submitit say of a submission or of a lost job; None for anything else."""
    if 'Could not detect "srun"' in str(error):
        return "there is no SLURM on this machine: submit where there is one, or use hardware=auto"
    if not type(error).__module__.startswith("submitit."):
        return None
    return f"SLURM: {' '.join(str(error).splitlines()[:2])}; the same command fills the gaps"


def disk_message(error: BaseException) -> str | None:
    """One line for a disk that takes no more, whoever found it out; None for anything else."""
    if "No space left on device" not in str(error) and getattr(error, "errno", None) not in FULL:
        return None
    place = getattr(error, "filename", None)
    return f"the disk is full{f' at {place}' if place else ''}: free some space, and the same command goes on"


def plugin_location(error: BaseException) -> str | None:
    """FILE:LINE of the user's own code, below --config-dir, where an error comes from; None where it is not theirs."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((Path(error.filename), error.lineno))
    own = [place for place in frames if any(place[0].is_relative_to(folder) for folder in plugin_dirs())]
    return f"{own[-1][0]}:{own[-1][1]}" if own else None


def suggest_key(key: str) -> str:
    """A suggestion among the keys of the composed default run and of the options named on the command line."""
    from omegaconf import DictConfig, OmegaConf

    choices = [word for word in sys.argv[1:] if word.partition("=")[0] in CONFIG_GROUPS and "," not in word]
    try:
        cfg = compose_config(choices)
    except Exception:
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
    alike = [name for name in keys if name.endswith((f".{last}", f"_{last}"))]
    if alike:
        return f"; did you mean {min(alike, key=lambda name: (not name.startswith('train.'), name.count('.'), name))}?"
    parent = key.rpartition(".")[0]
    near = [name for name in keys if name.rpartition(".")[0] == parent]
    return suggest(key, keys) if suggest(key, keys).startswith("; did") else suggest(key, near)


def format_error(error: Exception | Interrupted) -> tuple[str, int]:
    """An error in one line, and the exit code; what nobody foresaw leaves its traceback in a file."""
    if isinstance(error, ClpetError):
        return str(error), error.exit_code
    if isinstance(error, Interrupted):
        return str(error), EXIT_TEMPFAIL
    for message, code in ((disk_message(error), 1), (hydra_message(error), 2), (cluster_message(error), 1)):
        if message is not None:
            return message, code
    if type(error).__name__ == "OutOfMemoryError":
        hint = "lower hardware.micro_batch_size (training) or hardware.eval_batch_size (tests)"
        return f"the device is out of memory: {hint}; finished tasks are saved", 1
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}", 2
    if os.environ.get("CLPET_DEBUG"):
        raise error
    with tempfile.NamedTemporaryFile("w", prefix="clpet-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    text = (str(error).splitlines() or [""])[0]
    if place := plugin_location(error):
        return f"{place}: {type(error).__name__}: {text} (the whole traceback: {file.name})", 1
    return f"internal error, please report it with {file.name}: {type(error).__name__}: {text}", 1


def print_error(message: str, code: int) -> int:
    print(f"clpet: {inline(' '.join(message.split()))}", file=sys.stderr)
    return code
