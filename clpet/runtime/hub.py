"""The error message for files that should come from the Hugging Face hub: one wording for models and data sets."""

from clpet.errors import first_line


def unavailable(what: str, repo: str, error: Exception, alternative: str, data_set: bool = False) -> str:
    """States that `what` is neither on this machine nor loadable from the hub, and how to get it.

    `repo` is the id of its repository, and what follows it in the command `hf download`; `alternative` is the option
    to set instead.
    """
    kind = "--repo-type dataset " if data_set else ""
    return (
        f"{what} is not on this machine and cannot be loaded from the hub ({first_line(error)}): "
        f"run `hf download {kind}{repo}` where there is internet access, or set {alternative}"
    )
