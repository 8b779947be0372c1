"""vLLM's and SGLang's own readers of PEFT folders, in a process of its own, without their kernels.

python servers.py vllm|sglang SOURCE BASE FOLDER OUT: SOURCE holds the package `vllm` or `sglang`, BASE is a
transformers folder. The files that read adapters run as they are; what they import of the rest is made up here. OUT
gets the change of each weight that the server would add, `delta.<module>`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

REAL = {
    "vllm": ("vllm.lora.peft_helper", "vllm.lora.lora_model", "vllm.lora.lora_weights", "vllm.lora.utils"),
    "sglang": ("sglang.srt.lora.lora", "sglang.srt.lora.lora_config", "sglang.srt.lora.utils"),
}


class MadeUp(ModuleType):
    """A module in which everything is there: classes without content."""

    def __getattr__(self, name: str) -> Any:
        """Return a class of that name."""
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda self, *a, **k: None})
        setattr(self, name, made)
        return made


class Finder(MetaPathFinder, Loader):
    """Loads a program's own reader from its source and makes up what else the program has."""

    def __init__(self, program: str, source: Path) -> None:
        self.program, self.source = program, source

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Own modules of the program, and heavy ones of others that are not installed."""
        root = name.partition(".")[0]
        if root in (self.program, "triton"):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The source where it is a reader's, else nothing at all."""
        if spec.name in REAL[self.program]:
            return ModuleType(spec.name)
        made = MadeUp(spec.name)
        made.__path__ = []
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Run the source of a reader."""
        if module.__name__ in REAL[self.program]:
            file = self.source / (module.__name__.replace(".", "/") + ".py")
            module.__file__ = str(file)
            exec(compile(file.read_text("utf-8"), str(file), "exec"), module.__dict__)


def vllm(base: Path, folder: Path) -> dict[str, Any]:
    """By `LoRAModel.from_local_checkpoint`, after the checks of `PEFTHelper`."""
    import torch

    import_module("vllm.logger").init_logger = lambda name: SimpleNamespace(  # type: ignore[attr-defined]
        **dict.fromkeys(("info", "info_once", "warning", "warning_once", "debug"), lambda *a, **k: None)
    )
    import_module("vllm.utils.torch_utils").PIN_MEMORY = False  # type: ignore[attr-defined]
    helper = import_module("vllm.lora.peft_helper").PEFTHelper.from_local_dir(str(folder), None)
    rank = min(size for size in (1, 8, 16, 32, 64, 128, 256, 320, 512) if size >= helper.r)
    helper.validate_legal(SimpleNamespace(max_lora_rank=rank, bias_enabled=False))
    names = _modules(base)
    loaded = import_module("vllm.lora.lora_model").LoRAModel.from_local_checkpoint(
        str(folder),
        {name.rpartition(".")[2] for name in names},
        helper,
        lora_model_id=1,
        device="cpu",
        dtype=torch.float32,
    )
    found = {}
    for name, weights in loaded.loras.items():
        change = weights.lora_b @ weights.lora_a * weights.scaling
        found[name] = change if change.shape == names[name] else change.T  # a table is looked up, not multiplied
    return found


def sglang(base: Path, folder: Path) -> dict[str, Any]:
    """By `LoRAAdapter.initialize_weights_from_tensors`: q, k and v are one there, gate and up are one."""
    import re

    import torch
    from safetensors.torch import load_file

    def layer_id(name: str) -> int | None:
        found = re.search(r"(?:layers|h|blocks)\.(\d+)\.", name)
        return int(found[1]) if found else None

    import_module("sglang.srt.layers.utils").get_layer_id = layer_id  # type: ignore[attr-defined]
    config = import_module("sglang.srt.lora.lora_config").LoRAConfig(str(folder))
    backend = SimpleNamespace(name="csgmv")
    loader = import_module("sglang.srt.lora.lora")
    known = SimpleNamespace(**json.loads((base / "config.json").read_text("utf-8")))
    adapter = loader.LoRAAdapter("1", config, known, None, backend)
    adapter.initialize_weights_from_tensors(load_file(folder / "adapter_model.safetensors"))
    weights = {key: tensor for layer in adapter.layers for key, tensor in layer.weights.items()}
    weights |= adapter.embedding_layers
    found = {}
    for key, a in weights.items():
        if not key.endswith("lora_A.weight"):
            if not key.endswith(("lora_B.weight", "lora_embedding_A", "lora_embedding_B")):
                sys.exit(f"refused: it takes {key} and does nothing with it")
            continue
        b = weights[key.replace("lora_A", "lora_B")]
        pieces = a.split(adapter.config.r)
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rows = _rows(base, name, len(pieces))
        if sum(rows) != len(b) or len(a) % adapter.config.r:
            sys.exit(f"refused: {name} has {len(b)} rows and the ranks {[len(piece) for piece in pieces]}")
        parts = [half @ piece * adapter.scaling for half, piece in zip(b.split(rows), pieces)]
        place, _, own = name.rpartition(".")
        if name in _modules(base):
            found[name] = torch.cat(parts)
        else:
            found |= {f"{place}.{one}": part for one, part in zip(PACKED[own], parts)}
    for key, a in weights.items():
        if key.endswith("lora_embedding_A"):
            b = weights[key.replace("embedding_A", "embedding_B")]
            found[key.removeprefix("base_model.model.").removesuffix(".lora_embedding_A")] = (b @ a).T * adapter.scaling
    return found


PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def _rows(base: Path, name: str, pieces: int) -> list[int]:
    """Rows of each projection in a packed one."""
    known = json.loads((base / "config.json").read_text("utf-8"))
    heads, width = known["num_attention_heads"], known["hidden_size"]
    size = known.get("head_dim") or width // heads
    own = name.rpartition(".")[2]
    if own == "qkv_proj":
        keys = (known.get("num_key_value_heads") or heads) * size
        return [heads * size, keys, keys]
    if own == "gate_up_proj":
        return [known["intermediate_size"]] * 2
    shape = _modules(base)[name]
    return [shape[0]] if pieces == 1 else []


def _modules(base: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a transformers folder, by module."""
    from safetensors import safe_open

    with safe_open(base / "model.safetensors", "pt") as file:
        return {
            name.removesuffix(".weight"): tuple(file.get_slice(name).get_shape())
            for name in list(file.keys())
            if name.endswith(".weight")
        }


READERS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"vllm": vllm, "sglang": sglang}


def main(arguments: Sequence[str]) -> None:
    program, source, base, folder, out = arguments
    from safetensors.torch import save_file
    from transformers import PreTrainedConfig  # noqa: F401  before the finder, which would make up what it looks for

    sys.meta_path.insert(0, Finder(program, Path(source)))
    try:
        found = READERS[program](Path(base), Path(folder))
    except (ValueError, KeyError, RuntimeError, AssertionError, AttributeError) as error:
        sys.exit(f"refused: {type(error).__name__}: {error}")
    save_file({f"delta.{name}": delta.contiguous() for name, delta in found.items()}, out)


if __name__ == "__main__":
    main(sys.argv[1:])
