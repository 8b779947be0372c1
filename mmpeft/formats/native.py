"""The suite's own adapter folder: `adapter.json` (manifest) and the safetensors file it names.

The tensors' file carries its own hash in its name and the manifest is renamed into place last, so a folder
that is overwritten holds the old adapter or the new one at every moment. Nothing but JSON and safetensors is
ever read: no pickle, no code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, ConfigError, StateError
from mmpeft.files import only_writer, read_file, read_steadily, write_atomic
from mmpeft.formats.bounded import bounded, most_bytes
from mmpeft.formats.content import MOST_JSON, parse_object
from mmpeft.formats.fingerprint import Fingerprint
from mmpeft.hosting.host import original_class
from mmpeft.methods.base import Method
from mmpeft.methods.saved import READERS, Adapter
from mmpeft.methods.spec import from_spec, to_spec
from mmpeft.sites import Site, remembered, watched_sites
from mmpeft.sites.stored import from_json, to_json
from mmpeft.surgery.attached import Attached
from mmpeft.surgery.attaching import attach
from mmpeft.surgery.transaction import unchanged_on_error
from mmpeft.types import Facts, Json

FORMAT, VERSION = "mmpeft", 1
MANIFEST = "adapter.json"
SECTIONS = (("base", "class"), ("base", "fingerprint"), ("tensors", "file"), ("tensors", "sha256"))
"""What of a manifest must be text."""
LIBRARIES = ("mmpeft", "torch", "timm", "open_clip_torch", "diffusers", "transformers")


def save(tuning: Attached, folder: str | Path, *, inference: bool = False) -> Path:
    """Write a tuning's trainable tensors and its manifest; return the folder.

    With `inference` only what the forward pass needs is written: of AdaLoRA the components that are left.

    Raises:
        ConfigError: the tuning is merged, so the base is not itself; or it holds NaN or infinity.
        FileError: the disk is full, or the folder not writable; a former adapter in it stays whole.
    """
    folder = Path(folder)
    if tuning._state.merged:
        raise ConfigError(f"unmerge() {list(tuning._state.merged)} before saving: the base holds merged weights")
    whole = (tuning.method, tuning.state_dict(), tuning.placements)
    method, found, placements = tuning.inference_form() if inference else whole
    tensors = {name: tensor.cpu().contiguous() for name, tensor in found.items()}
    check_saved(tensors, folder)
    data = dump_tensors(tensors, metadata={"format": "pt"})
    digest = hashlib.sha256(data).hexdigest()
    file = folder / f"adapter-{digest[:12]}.safetensors"
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "method": to_spec(method),
        "base": {"class": base_class(tuning.model), **Fingerprint.of(tuning.model, tuning.placements).facts()},
        "tensors": {"file": file.name, "sha256": digest, "count": len(tensors)},
        "sites": [{"path": p.home, "part": p.key, "role": p.role} for p in placements],
        "libraries": library_versions(),
    }
    text = _text(manifest, watched_sites(tuning.model)).encode()
    with only_writer(folder):
        write_atomic(file, data)
        write_atomic(folder / MANIFEST, text)
        for stale in folder.glob("adapter-*.safetensors"):
            if stale != file:
                stale.unlink(missing_ok=True)
    return folder


def _text(manifest: Facts, anatomy: Iterable[Site]) -> str:
    """The manifest with one line for each site of the model that it was made for."""
    lines = [json.dumps(to_json(site), separators=(",", ":"), ensure_ascii=False) for site in anatomy]
    text = json.dumps({**manifest, "anatomy": []}, indent=1, ensure_ascii=False)
    joined = ",\n  ".join(lines)
    return f"{text.removesuffix('[]' + chr(10) + '}')}[\n  {joined}\n ]\n}}\n"


def load(
    model: nn.Module, folder: str | Path, name: str = "default", *, check_base: bool = True, run: bool = True
) -> Attached:
    """Attach what an adapter folder holds; `mmpeft.load` says more, and gives the whole handle."""
    folder = Path(folder)
    limit = most_bytes(model)
    manifest, tensors = read_steadily(lambda: _read(folder, limit), folder / MANIFEST)
    try:
        method = from_spec(manifest["method"])
        expected = Fingerprint.read(manifest["base"])
        anatomy = [from_json(site) for site in manifest.get("anatomy") or ()]
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        made = manifest["libraries"].get("mmpeft", "?")
        raise AdapterFileError(f"{folder / MANIFEST} (written by mmpeft {made}): {error}") from error
    with remembered(model, anatomy), unchanged_on_error(model):
        with bounded(model, tensors.values(), f"the adapter in {folder}"):
            tuning = _attach(model, method, name, f"the adapter in {folder}", manifest["base"]["class"], run)
        own = Fingerprint.of(model, tuning.placements) if check_base else None
        if own and not own.fits(expected):
            raise AdapterFileError(
                f"the adapter in {folder} was made for another base: expected {manifest['base']['class']} "
                f"{expected.digest}, this model is {base_class(model)} {own.digest}. Load the base it "
                "was trained on; in Python, check_base=False takes this one if the weights are meant to differ"
            )
        tuning.load_state_dict(tensors)
    return tuning


def _read(folder: Path, limit: int) -> tuple[Json, dict[str, Tensor]]:
    manifest = read_manifest(folder)
    return manifest, read_tensors(folder, manifest["tensors"], MANIFEST, limit)


def borrow(model: nn.Module, source: str | Path | Attached) -> Adapter:
    """An adapter as material: from a folder, with every check that loading makes, or from a tuning.

    The model stays as it is.

    Raises:
        AdapterFileError: no adapter folder, a damaged one, or one made for another base.
    """
    if isinstance(source, Attached):
        return Adapter(source.name, source.method, source.placements, source.state_dict())
    random = torch.get_rng_state()
    with unchanged_on_error(model):
        tuning = load(model, source, "borrowed", run=False)
        found = Adapter(str(source), tuning.method, tuning.placements, tuning.state_dict())
        tuning.detach()
        torch.set_rng_state(random)
    return found


READERS.append(borrow)


def _attach(model: nn.Module, method: Method, name: str, what: str, made_for: str, run: bool) -> Attached:
    """`attach`, whose refusals are the file's fault; so is what a field of another type leads to."""
    try:
        attach(model, method, name, run=run)
    except AdapterFileError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise AdapterFileError(
            f"{what} was made for {made_for} and does not attach to {base_class(model)}: {error}"
        ) from error
    return Attached(model, name)


def read_manifest(folder: Path) -> Json:
    """The manifest of an adapter folder, checked for what this version can read.

    Raises:
        AdapterFileError: missing, not JSON, foreign, or of a newer version.
    """
    path = folder / MANIFEST
    if folder.is_file():
        raise AdapterFileError(f"expected a folder with {MANIFEST}, got the file {folder}")
    if not path.exists():
        what = "the folder does not exist"
        if folder.exists():
            names = sorted(p.name for p in folder.iterdir())
            what = f"it holds {names[:5] or 'nothing'}"
            if "adapter_config.json" in names:
                what += ", which is a Hugging Face PEFT folder: mmpeft.load_foreign(model, folder) reads it"
            elif any(n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) for n in names):
                what += "; pickled files are never read, because unpickling runs code"
        raise AdapterFileError(f"no {MANIFEST} in {folder}: {what}")
    try:
        manifest = parse_object(read_file(path, MOST_JSON, AdapterFileError).decode("utf-8"))
        if manifest["format"] != FORMAT:
            raise AdapterFileError(f"{path}: expected format {FORMAT!r}, got {manifest['format']!r}")
        if manifest["version"] > VERSION:
            raise AdapterFileError(
                f"{path} has version {manifest['version']}, this mmpeft reads up to {VERSION}; update mmpeft"
            )
        for section, key in SECTIONS:
            if not isinstance(manifest[section][key], str):
                raise TypeError(f"{section}.{key} is {manifest[section][key]!r}")
        manifest["libraries"] = dict(manifest.get("libraries") or {})
    except AdapterFileError:
        raise
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not a manifest of this suite, or only a part of one: {error!r}") from error
    return manifest


def tensors_path(folder: Path, entry: Facts, manifest: str) -> Path:
    """The file that a manifest's entry names, which lies beside the manifest and nowhere else.

    Raises:
        AdapterFileError: another place, another kind of file, or it is missing.
    """
    path = folder / str(entry["file"])
    if path.parent != folder or path.suffix != ".safetensors":
        raise AdapterFileError(
            f"{folder / manifest} names {entry['file']!r}; only a .safetensors file beside it is read"
        )
    if not path.exists():
        raise AdapterFileError(f"{path} is missing; the folder was copied in part")
    return path


def read_tensors(folder: Path, entry: Facts, manifest: str, limit: int) -> dict[str, Tensor]:
    """The tensors of the `file` that a manifest's entry names, of at most `limit` bytes, checked against its `sha256`.

    Raises:
        AdapterFileError: missing, partial, changed after saving, too large for its model, or no safetensors.
    """
    path = tensors_path(folder, entry, manifest)
    data = read_file(path, limit, AdapterFileError)
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry["sha256"]:
        raise AdapterFileError(
            f"{path} is truncated or was changed after saving: expected sha256 {entry['sha256'][:12]}…, "
            f"got {digest[:12]}… ({len(data):,} bytes)"
        )
    try:
        return load_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{path} is no safetensors file: {error}") from error


def check_saved(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise StateError for values that nothing could load again: the file that is there is better than they are."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise StateError(
                f"{name} holds NaN or infinity: training has diverged, and such an adapter cannot be loaded. Nothing "
                f"is written; what is in {folder} stays. Go on from an earlier state, with a smaller learning rate"
            )


def base_class(model: nn.Module) -> str:
    """The name of the model's class as its library wrote it."""
    return original_class(model).__name__


def library_versions() -> dict[str, str]:
    """Versions of this suite and of the libraries whose models it tunes."""
    return {library: found for library in LIBRARIES if (found := _version(library))}


@cache
def _version(library: str) -> str:
    """Empty for what is not installed; kept, because reading a package's metadata takes two milliseconds."""
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
