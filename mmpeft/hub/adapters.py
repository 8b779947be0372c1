"""Adapters in repositories of the hub: fetched by name, and uploaded with a card."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from mmpeft._extras import needed_by
from mmpeft.errors import AdapterFileError, ConfigError, Refused
from mmpeft.files import write_atomic
from mmpeft.formats import native
from mmpeft.formats.exchange import export
from mmpeft.hub.card import Card
from mmpeft.hub.reach import from_hub, why_not
from mmpeft.surgery.attached import Attached
from mmpeft.types import Untyped

REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")
WANTED = ("*.json", "*.safetensors", "*/*.json", "*/*.safetensors")
"""All that is read of an adapter; code and pickles stay where they are."""
PEFT = "peft"
"""Folder of the same adapter for PEFT, in a repository."""


def local(source: str | Path) -> Path:
    """The folder of an adapter: the path itself where there is something, else what the hub has of that name.

    Args:
        source: a path, or `user/repository`, `user/repository@revision`.

    Raises:
        AdapterFileError: a repository cannot be fetched.
        MissingExtraError: huggingface_hub is not installed.
    """
    path = Path(source)
    if path.exists() or not REPOSITORY.fullmatch(str(source)):
        return path
    with needed_by(f"{source}, which is no path here and may be a repository of the hub,", "hub"):
        from huggingface_hub import snapshot_download
    name, _, revision = str(source).partition("@")
    try:
        with from_hub():
            return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(WANTED)))
    except Exception as error:  # of the hub's library, of HTTP, of files: all mean that it is not here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterFileError(
            f"{source} is no path here, and cannot be fetched from the hub: {reason}{why_not()}"
        ) from error


def push(tuning: Attached, repository: str, card: Card, private: bool = False) -> str:
    """Upload an adapter with its card, and where PEFT can read it also its PEFT folder; return the commit's address.

    Raises:
        ConfigError: no name of a repository, or the hub refuses.
        MissingExtraError: huggingface_hub is not installed.
    """
    if not REPOSITORY.fullmatch(repository) or "@" in repository:
        raise ConfigError(f"expected user/repository, got {repository!r}")
    with needed_by("push_to_hub", "hub"):
        from huggingface_hub import HfApi
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        native.save(tuning, folder, inference=True)
        try:
            export(tuning, folder / PEFT, "peft")
        except (Refused, ConfigError, AdapterFileError):  # PEFT has no such method, which the card leaves out then
            in_peft = False
        else:
            in_peft = True
        write_atomic(folder / "README.md", card.text(repository, PEFT if in_peft else None).encode())
        api = HfApi()
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            done: Untyped = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"{card.method_name} by mmpeft"
            )
        except Exception as error:  # of the hub's library or of HTTP: no token, no right, no network
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            raise ConfigError(
                f"cannot upload to {repository}: {reason}{why_not()}; `hf auth login` stores a token that may write"
            ) from error
    return str(done)
