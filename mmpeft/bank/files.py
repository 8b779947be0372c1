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
from mmpeft.files import write_atomic
from mmpeft.formats.content import parse_object
from mmpeft.formats.fingerprint import Fingerprint
from mmpeft.formats.native import base_class, library_versions, read_tensors
from mmpeft.hosting.values import unfit
from mmpeft.methods.spec import from_spec, to_spec
from mmpeft.surgery.state import state_of
from mmpeft.surgery.transaction import unchanged_on_error
from mmpeft.types import Json

if TYPE_CHECKING:
    from mmpeft.bank.bank import Bank

FORMAT, VERSION = "mmpeft-bank", 1
MANIFEST = "bank.json"


def save(bank: Bank, folder: Path) -> Path:
    """Write every entry; files whose content is unchanged are left as they are."""
    state = state_of(bank.model)
    if state is not None and state.merged:
        raise StateError(f"unmerge() {list(state.merged)} before saving: the base holds merged weights")
    entries, files = [], []
    for name in bank.ids:
        data = dump_tensors(_tensors(bank, name), metadata={"format": "pt"})
        digest = hashlib.sha256(data).hexdigest()
        file = folder / f"{name}-{digest[:12]}.safetensors"
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            write_atomic(file, data)
        files.append(file)
        entries.append(_facts(bank, name) | {"file": file.name, "sha256": digest})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "base": {"class": base_class(bank.model)},
        "entries": entries,
        "libraries": library_versions(),
    }
    write_atomic(folder / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    for stale in set(folder.glob("*.safetensors")) - set(files):
        stale.unlink(missing_ok=True)
    return folder


def _tensors(bank: Bank, name: str) -> dict[str, Tensor]:
    entry = bank[name]
    found = {f"entry.{key}": tensor for key, tensor in entry.state_dict().items()}
    found |= {f"state.{key}": tensor for key, tensor in entry.state.items()}
    if entry.method is not None:
        found |= {f"tuning.{key}": tensor for key, tensor in bank.tuning(name).state_dict().items()}
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in found.items()}


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
    manifest = _manifest(folder)
    with unchanged_on_error(bank):
        try:
            for facts in manifest["entries"]:
                _add(bank, folder, facts, manifest["base"]["class"])
        except MMPEFTError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterFileError(f"{folder / MANIFEST} is only a part of a manifest: {error!r}") from error
    return bank


def _add(bank: Bank, folder: Path, facts: Json, made_for: str) -> None:
    name = facts["id"]
    tensors = read_tensors(folder, facts, MANIFEST)
    head = None if facts["head"] is None else head_from(facts["head"], _below(tensors, "entry.head."))
    try:
        method = None if facts["method"] is None else from_spec(facts["method"])
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
    if not path.is_file():
        raise AdapterFileError(f"no {MANIFEST} in {folder}: not the folder of a bank")
    try:
        manifest = parse_object(path.read_text("utf-8"))
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
