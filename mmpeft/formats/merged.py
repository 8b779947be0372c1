"""Whole models with a tuning merged in, written as their own library reads them.

transformers and diffusers: a folder by `save_pretrained`. timm and open_clip: one safetensors state dict, for
`timm.create_model(..., checkpoint_path=...)` and `open_clip.create_model(..., pretrained=...)`; any other module gets
the same file. The library itself reads back what was written before it takes its place.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, ConfigError, Refused
from mmpeft.files import scratch_folder
from mmpeft.formats.verify import REFUSALS, plain_copy
from mmpeft.hosting.host import base_value, original_class
from mmpeft.hosting.modules import module_at
from mmpeft.hosting.offload import check_present
from mmpeft.surgery.attached import Attached
from mmpeft.types import AnyModule, Config, Kwargs, Untyped

FOLDERS = ("transformers", "diffusers")
FILE = "model.safetensors"
BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
    *("image_processor_config.json", "video_preprocessor_config.json", "feature_extractor_config.json"),
)
"""What a transformers model is used with, which its own `save_pretrained` leaves to others. No file of code is one."""


@dataclass(frozen=True)
class Merged:
    """A written model, the library that has read it back, and how many tensors were compared bit for bit."""

    path: Path
    library: str
    tensors: int
    bytes: int
    untied: tuple[str, ...] = ()
    """Tensors that were one in the base and are two now."""
    kept: tuple[str, ...] = ()
    """Files of the base's folder that lie beside the model again: its words, templates and preprocessing."""


def save_merged(tuning: Attached, path: str | Path) -> Merged:
    """Merge a tuning and write the whole model; the tuned model is as before afterwards, bit for bit.

    Raises:
        Refused: a part is no change of base weights, or the library's model has no place for what the tuning made.
        AdapterFileError: the library reads something else back; nothing is written then.
    """
    plain = merged_copy(tuning)
    library = library_of(plain)
    untied = _check_places(tuning.model, plain)
    path = Path(path)
    if library in FOLDERS:
        return _write_folder(plain, path, library, untied)
    return _write_file(plain, path if path.suffix == ".safetensors" else path / FILE, library, untied)


def merged_copy(tuning: Attached) -> nn.Module:
    """The merged model in its library's own classes; what the tuning leaves alone is the base's storage.

    Raises:
        ConfigError: the base holds merged weights already.
    """
    state = tuning._state
    if state.merged:
        raise ConfigError(f"unmerge() {list(state.merged)} before save_merged(): the base holds merged weights")
    check_present(tuning.model, "save_merged()")
    plain = plain_copy(tuning.model)
    tuning.merge()
    try:
        for path, name, _ in state.merged[tuning.name]:
            value = base_value(state.hosts[path], name)
            module = module_at(plain, path)
            if name in module._buffers:
                module._buffers[name] = value
            else:
                module._parameters[name] = None if value is None else nn.Parameter(value.detach(), False)
    finally:
        tuning.unmerge()
    return plain


def library_of(model: nn.Module) -> str:
    """The library whose model this is, `torch` for a module of none."""
    roots = [cls.__module__.partition(".")[0] for cls in original_class(model).__mro__]
    return next((root for root in roots if root in (*FOLDERS, "timm", "open_clip")), "torch")


# -- what has a place ---------------------------------------------------------------------------------------


def _check_places(tuned: nn.Module, plain: nn.Module) -> tuple[str, ...]:
    """Raise Refused unless a model that the library builds holds every tensor; return what is no longer tied."""
    base = plain_copy(tuned)
    name = type(plain).__name__
    made = sorted(set(plain.state_dict()) - set(base.state_dict()))
    if made:
        raise Refused(
            f"merging creates {len(made)} tensors that {name} has no place for, first {made[0]}; a reader would drop "
            "them without a word. Use tuning.save(), or create=False"
        )
    known = dict(base.named_parameters(remove_duplicate=False))
    now = dict(plain.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    split = []
    for key, parameter in known.items():
        partner = first.setdefault(id(parameter), key)
        if not _same(now[partner], now[key]):
            split.append((partner, key))
    if not split:
        return ()
    config: Config = getattr(plain, "config", None)
    heads = {id(module) for module in (_part(plain, "get_output_embeddings"), _part(plain, "get_input_embeddings"))}
    for pair in split:
        owners = [id(module_at(plain, key.rpartition(".")[0])) for key in pair]
        if not set(owners) <= heads or not hasattr(config, "tie_word_embeddings"):
            raise Refused(
                f"{pair[0]} and {pair[1]} are one tensor in {name} and differ after merging; no config of it says so"
            )
    for part in (config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", ()))):
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = False
    return tuple(key for _, key in split)


def _part(model: nn.Module, getter: str) -> object:
    return getattr(model, getter)() if hasattr(model, getter) else None


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


# -- out, and back ------------------------------------------------------------------------------------------


def _write_folder(plain: AnyModule, folder: Path, library: str, untied: tuple[str, ...]) -> Merged:
    if folder.suffix == ".safetensors" or folder.is_file():
        raise AdapterFileError(f"{library} reads a folder; {folder} is the name of one file")
    if folder.exists() and any(folder.iterdir()):
        raise AdapterFileError(f"{folder} is not empty; a model is written into a folder of its own")
    with scratch_folder(folder) as scratch:
        if untied:
            _untie(plain)
        with torch.random.fork_rng(devices=[]):
            plain.save_pretrained(str(scratch), safe_serialization=True)
            fresh = _read(library, lambda: type(plain).from_pretrained(str(scratch), **_dtype(plain, library)))
        count = _compare(library, plain.state_dict(), fresh.state_dict())
        kept = _keep_beside(plain, scratch) if library == "transformers" else ()
        os.replace(scratch, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Merged(folder, library, count, size, untied, kept)


def _keep_beside(plain: AnyModule, folder: Path) -> tuple[str, ...]:
    """Copy what the base is used with from where it was read: a local folder, or the hub's cache."""
    name = getattr(plain.config, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return ()
    kept = []
    for file in (*BESIDE, *_more_templates(Path(name))):
        source = Path(name) / file if Path(name).is_dir() else _cached(name, file)
        if source is not None and source.is_file() and not (folder / file).exists():
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / file)
            kept.append(file)
    return tuple(kept)


def _more_templates(base: Path) -> list[str]:
    """Named chat templates, which have a folder of their own."""
    own = base / "additional_chat_templates"
    return [f"{own.name}/{file.name}" for file in sorted(own.glob("*.jinja"))] if own.is_dir() else []


def _cached(name: str, file: str) -> Path | None:
    """A file of a model that was loaded from the hub."""
    try:
        found: Untyped = import_module("huggingface_hub").try_to_load_from_cache(name, file)
    except (ImportError, ValueError):
        return None
    return Path(found) if isinstance(found, str) else None


def _untie(plain: AnyModule) -> None:
    """transformers notes at construction which tensors are one, and saves one of them only."""
    if hasattr(plain, "all_tied_weights_keys"):
        plain.all_tied_weights_keys = plain.get_expanded_tied_weights_keys(all_submodels=True)


def _dtype(plain: AnyModule, library: str) -> Kwargs:
    return {"dtype" if library == "transformers" else "torch_dtype": plain.dtype}


def _write_file(plain: nn.Module, file: Path, library: str, untied: tuple[str, ...]) -> Merged:
    if file.is_dir():
        raise AdapterFileError(f"expected a file name, {file} is a folder")
    wanted = plain.state_dict()
    tensors: dict[str, Tensor] = {}
    stores: set[int] = set()
    for key, tensor in wanted.items():
        whole = tensor.detach().cpu().contiguous()
        tensors[key] = whole.clone() if whole.data_ptr() in stores else whole  # the format has no shared tensors
        stores.add(whole.data_ptr())
    with scratch_folder(file) as scratch:
        new = scratch / "model.safetensors"
        save_file(tensors, new, {"format": "pt"})
        fresh = _wiped(plain)
        with torch.random.fork_rng(devices=[]):
            _read(library, lambda: LOADERS[library](fresh, new))
        count = _compare(library, wanted, fresh.state_dict())
        os.replace(new, file)
    return Merged(file, library, count, file.stat().st_size, untied)


def _wiped(plain: nn.Module) -> nn.Module:
    """The same model over storage of its own, every tensor of it wiped: what is not read back is seen."""
    fresh = copy.deepcopy(plain)
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    return fresh


def _load_timm(model: nn.Module, file: Path) -> None:
    import_module("timm.models").load_checkpoint(model, str(file), strict=True)


def _load_open_clip(model: nn.Module, file: Path) -> None:
    import_module("open_clip").load_checkpoint(model, str(file), strict=True)


def _load_torch(model: nn.Module, file: Path) -> None:
    model.load_state_dict(load_file(file))


LOADERS: dict[str, Callable[[nn.Module, Path], None]] = {
    "timm": _load_timm,
    "open_clip": _load_open_clip,
    "torch": _load_torch,
}


def _read(library: str, load: Callable[[], Untyped]) -> Untyped:
    try:
        return load()
    except REFUSALS as error:
        raise AdapterFileError(f"{library} does not read the model that was written: {error}") from error


def _compare(library: str, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> int:
    for names, what in ((set(wanted) - set(got), "loses"), (set(got) - set(wanted), "adds")):
        if names:
            raise AdapterFileError(
                f"{library} {what} {len(names)} tensors on the way, first {min(names)}; nothing is kept"
            )
    for name, tensor in wanted.items():
        back = got[name]
        if back.shape != tensor.shape or not torch.equal(back.cpu(), tensor.detach().cpu().to(back.dtype)):
            raise AdapterFileError(f"{library} reads another value of {name} than was written; nothing is kept")
    return len(wanted)
