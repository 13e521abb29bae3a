"""`clpet export --hub USER/NAME`: uploads an exported folder to the Hugging Face hub."""

import os
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

from clpet.errors import ConfigError, HostError, first_line


def check_upload(repo: str) -> None:
    """Raises ConfigError for an invalid name, and without a login, before anything is loaded."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--hub {repo}: {first_line(error)}") from error
    if "/" not in repo:
        raise ConfigError(f"--hub {repo}: give the repository as USER/NAME")
    if get_token() is None:
        raise ConfigError("--hub needs a login: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repo: str, public: bool) -> str:
    """Uploads the folder as one commit, into a new repository unless it exists; returns its address.

    A new repository is private unless `public`. Raises HostError; the folder stays.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model exported by clpet")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:  # ValueError: no JSON
        raise HostError(
            f"{folder} is written but not uploaded ({first_line(error)}); upload it later with "
            f"`hf upload {repo} {folder}`"
        ) from error
    return str(address)
