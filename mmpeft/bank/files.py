"""A bank's folder: `bank.json` (versioned manifest) and one safetensors file an entry.

Files carry their own hash in their names and the manifest is renamed into place last, so that a folder holds the old
bank or the new one at every moment. Nothing but JSON and safetensors is read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from mmpeft.bank.entry import Entry
from mmpeft.bank.heads import head_from
from mmpeft.errors import AdapterFileError, MMPEFTError, StateError
from mmpeft.files import only_writer, read_file, read_steadily, write_atomic
from mmpeft.formats.bounded import bounded, most_bytes
from mmpeft.formats.content import MOST_JSON, parse_object
from mmpeft.formats.fingerprint import Fingerprint
from mmpeft.formats.native import base_class, check_saved, library_versions, read_tensors
from mmpeft.hosting.values import unfit
from mmpeft.methods.spec import from_spec, to_spec
from mmpeft.surgery.state import state_of
from mmpeft.surgery.transaction import unchanged_on_error
from mmpeft.types import Json

if TYPE_CHECKING:
    from mmpeft.bank.bank import Bank

FORMAT, VERSION = "mmpeft-bank", 1
MANIFEST = "bank.json"
PREFIX = "entry-"
"""Of files of entries: what else lies in the folder is never removed."""
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError, RecursionError)
"""What fields of other types lead to."""


def save(bank: Bank, folder: Path) -> Path:
    """Write every entry; files whose content is unchanged are left as they are.

    Raises:
        StateError: a tuning is merged, or an entry holds NaN or infinity. FileError: the folder is not writable.
    """
    state = state_of(bank.model)
    if state is not None and state.merged:
        raise StateError(f"unmerge() {list(state.merged)} before saving: the base holds merged weights")
    for name in bank.ids:
        found = _tensors(bank, name)
        check_saved({key: tensor for key, tensor in found.items() if not key.startswith("state.")}, folder)
    with only_writer(folder):
        stale = _named_before(folder)
        entries = [_saved(bank, name, folder) for name in bank.ids]
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "base": {"class": base_class(bank.model)},
            "entries": entries,
            "libraries": library_versions(),
        }
        write_atomic(folder / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
        stale |= {path.name for path in folder.glob(f"{PREFIX}*.safetensors")}
        for file in stale - {entry["file"] for entry in entries}:
            (folder / file).unlink(missing_ok=True)
    return folder


def _saved(bank: Bank, name: str, folder: Path) -> Json:
    """Write an entry's tensors; what the manifest says of it."""
    tensors = {key: tensor.cpu().clone().contiguous() for key, tensor in _tensors(bank, name).items()}
    data = dump_tensors(tensors, metadata={"format": "pt"})
    digest = hashlib.sha256(data).hexdigest()
    file = f"{PREFIX}{name[:60]}-{digest[:12]}.safetensors"  # the digest tells them apart, so a long name may be cut
    if not _holds(folder / file, data):
        write_atomic(folder / file, data)
    return _facts(bank, name) | {"file": file, "sha256": digest}


def _named_before(folder: Path) -> set[str]:
    """The files of the bank that is there; others in the folder are somebody else's."""
    try:
        entries = _manifest(folder)["entries"]
        return {entry["file"] for entry in entries if Path(entry["file"]).parent == Path() and entry["file"]}
    except (AdapterFileError, KeyError, TypeError):
        return set()


def _holds(file: Path, data: bytes) -> bool:
    try:
        return file.stat().st_size == len(data) and file.read_bytes() == data
    except OSError:
        return False


def _tensors(bank: Bank, name: str) -> dict[str, Tensor]:
    entry = bank[name]
    found = {f"entry.{key}": tensor for key, tensor in entry.state_dict().items()}
    found |= {f"state.{key}": tensor for key, tensor in entry.state.items()}
    if entry.method is not None:
        found |= {f"tuning.{key}": tensor for key, tensor in bank.tuning(name).state_dict().items()}
    return {key: tensor.detach() for key, tensor in found.items()}


def _facts(bank: Bank, name: str) -> Json:
    entry = bank[name]
    placements = bank.tuning(name).placements if entry.method is not None else ()
    return {
        "id": name,
        "method": None if entry.method is None else to_spec(entry.method),
        "head": None if entry.head is None else entry.head.spec(),
        "base": Fingerprint.of(bank.model, placements).facts(),
        "frozen": entry.frozen,
        "trains": [i for i, p in enumerate(bank.parameters_of(name)) if p.requires_grad],
        "meta": entry.meta,
    }


def load(bank: Bank, folder: Path) -> Bank:
    """Fill an empty bank; the model is left as it was if anything is wrong."""
    limit = most_bytes(bank.model)
    manifest, tensors = read_steadily(lambda: _read(folder, limit), folder / MANIFEST)
    with unchanged_on_error(bank):
        try:
            for facts, own in zip(manifest["entries"], tensors, strict=True):
                _add(bank, folder, facts, own, manifest["base"]["class"])
        except MMPEFTError:
            raise
        except UNREADABLE as error:
            raise AdapterFileError(f"{folder / MANIFEST} is only a part of a manifest: {error!r}") from error
    return bank


def _read(folder: Path, limit: int) -> tuple[Json, list[dict[str, Tensor]]]:
    """Manifest and tensors of every entry: all is read before anything is built."""
    manifest = _manifest(folder)
    try:
        return manifest, [read_tensors(folder, facts, MANIFEST, limit) for facts in manifest["entries"]]
    except MMPEFTError:
        raise
    except UNREADABLE as error:
        raise AdapterFileError(f"{folder / MANIFEST} is only a part of a manifest: {error!r}") from error


def _add(bank: Bank, folder: Path, facts: Json, tensors: dict[str, Tensor], made_for: str) -> None:
    name = facts["id"]
    try:
        method = None if facts["method"] is None else from_spec(facts["method"])
        with bounded(bank.model, tensors.values(), f"entry {name!r} in {folder}"):
            head = None if facts["head"] is None else head_from(facts["head"], _below(tensors, "entry.head."))
            entry = bank.add_task(name, method, head)
    except AdapterFileError:
        raise
    except MMPEFTError as error:
        raise AdapterFileError(
            f"entry {name!r} in {folder} was made for {made_for} and does not attach to "
            f"{base_class(bank.model)}: {error}"
        ) from error
    placements = () if method is None else bank.tuning(name).placements
    own, expected = Fingerprint.of(bank.model, placements), Fingerprint.read(facts["base"])
    if not own.fits(expected):
        raise AdapterFileError(
            f"entry {name!r} in {folder} was made for another base: expected {made_for} {expected.digest}, this model "
            f"is {base_class(bank.model)} {own.digest}"
        )
    if method is not None:
        bank.tuning(name).load_state_dict(_below(tensors, "tuning."))
    device = next(bank.model.parameters()).device
    _restore(entry, tensors, facts, device)
    for i, parameter in enumerate(bank.parameters_of(name)):
        parameter.requires_grad_(i in facts["trains"])


def _restore(entry: Entry, tensors: dict[str, Tensor], facts: Json, device: torch.device) -> None:
    for key, tensor in _below(tensors, "entry.learned.").items():
        why = unfit(tensor, tensor.dtype)
        if why:
            raise AdapterFileError(f"{key} of entry {facts['id']!r} {why}")
        entry.learned[key] = nn.Parameter(tensor.to(device))
    entry.state = {key: tensor.to(device) for key, tensor in _below(tensors, "state.").items()}
    entry.frozen, entry.meta = bool(facts["frozen"]), dict(facts["meta"])


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _manifest(folder: Path) -> Json:
    path = folder / MANIFEST
    if not path.exists():
        raise AdapterFileError(f"no {MANIFEST} in {folder}: not the folder of a bank")
    try:
        manifest = parse_object(read_file(path, MOST_JSON, AdapterFileError).decode("utf-8"))
        if manifest["format"] != FORMAT:
            raise AdapterFileError(f"{path}: expected format {FORMAT!r}, got {manifest['format']!r}")
        if manifest["version"] > VERSION:
            raise AdapterFileError(
                f"{path} has version {manifest['version']}, this mmpeft reads up to {VERSION}; update mmpeft"
            )
    except AdapterFileError:
        raise
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not a manifest of a bank, or only a part of one: {error!r}") from error
    return manifest
