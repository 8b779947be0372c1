"""llama.cpp, in a process of its own: its converter, its own program where that is built, and its runtime.

python llama_cpp.py SOURCE BASE FOLDER OUT [LIBRARY]: SOURCE is a checkout, BASE a transformers folder, FOLDER a PEFT
folder. OUT gets the tensors of the base's GGUF file (`base.*`), of that of BASE/merged (`merged.*`) and the change that
the adapter's GGUF file is (`delta.*`), all under GGUF's names; with LIBRARY, a folder with libllama, the logits of
token ids without and with the adapter (`logits.base`, `logits.tuned`) and of the merged model (`logits.merged`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


def main(arguments: Sequence[str]) -> None:
    source, base, folder, out = (Path(value) for value in arguments[:4])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import numpy
    import torch
    from safetensors.torch import save_file

    lora = out.with_suffix(".lora.gguf")
    command = [sys.executable, str(source / "convert_lora_to_gguf.py"), str(folder), "--base", str(base)]
    done = subprocess.run([*command, "--outfile", str(lora)], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in lines if "ERROR" in line] or lines[-1:]
        sys.exit(f"refused: {said[0].strip()}")
    files = {"base": _convert(base, out.with_suffix(".base.gguf"))}
    if (base / "merged").exists():
        files["merged"] = _convert(base / "merged", out.with_suffix(".merged.gguf"))
    tensors: dict[str, Any] = {}
    for name, file in files.items():
        tensors |= {f"{name}.{key}": value for key, value in _tensors(file)[0].items()}
    adapter, alpha = _tensors(lora)
    for key in [key for key in adapter if key.endswith(".lora_a")]:
        a, b = adapter[key], adapter[key.replace(".lora_a", ".lora_b")]
        name = key.removesuffix(".lora_a")
        if name == "token_embd.weight":  # the runtime looks the rows of A up, and turns B
            tensors[f"delta.{name}"] = (a @ b.T) * (alpha / b.shape[-1])
        else:
            tensors[f"delta.{name}"] = (b @ a) * (alpha / b.shape[-1])
    for key in adapter:
        if not key.endswith((".lora_a", ".lora_b")):
            tensors[f"delta.{key}"] = adapter[key] * 0  # llama-adapter.cpp skips norms and takes nothing else
    if len(arguments) > 4:
        tensors |= _run(Path(arguments[4]), source, files, lora)
    save_file({key: torch.from_numpy(numpy.ascontiguousarray(value)) for key, value in tensors.items()}, out)


def _convert(folder: Path, file: Path) -> Path:
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    own: Any = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))

    class Bare(own):  # type: ignore[misc]
        """Without words: token ids go in."""

        model_arch = own.model_arch

        def set_vocab(self) -> None:
            self.gguf_writer.add_tokenizer_model("none")
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    with torch.inference_mode():
        Bare(folder, gguf.LlamaFileType.ALL_F32, file, use_temp_file=False, eager=True).write()
    return file


def _tensors(file: Path) -> tuple[dict[str, Any], float]:
    import gguf

    reader = gguf.GGUFReader(file)
    found = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).copy() for tensor in reader.tensors}
    field = reader.get_field("adapter.lora.alpha")
    return found, float(field.contents()) if field else 0.0


def _run(library: Path, source: Path, files: dict[str, Path], lora: Path) -> dict[str, Any]:
    os.environ["LLAMA_CPP_LIB_PATH"] = str(library)
    package = ModuleType("llama_cpp")  # llama-cpp-python, which has llama.cpp under vendor/; its bindings alone
    package.__path__ = [str(source.parent.parent / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    llama_cpp: Any = import_module("llama_cpp.llama_cpp")
    llama_cpp.llama_backend_init()
    found = {}
    for name, file in files.items():
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_mmap = False
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        found[f"logits.{name}"] = _logits(llama_cpp, model)
        if name == "base":
            adapter = llama_cpp.llama_adapter_lora_init(model, str(lora).encode())
            if not adapter:
                sys.exit("refused: llama_adapter_lora_init finds no place for a tensor of the adapter")
            found["logits.tuned"] = _logits(llama_cpp, model, adapter)
    return found


def _logits(api: Any, model: Any, adapter: Any = None) -> Any:
    import ctypes

    import numpy

    options = api.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = 32, 1, 1
    context = api.llama_init_from_model(model, options)
    if adapter is not None:
        adapters = (api.llama_adapter_lora_p_ctypes * 1)(adapter)
        api.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
    vocabulary = api.llama_model_get_vocab(model)
    count, tokens = api.llama_vocab_n_tokens(vocabulary), [1, 4, 9, 16, 25, 36, 7]
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
        batch.seq_id[place][0], batch.logits[place] = 0, 1
    if api.llama_decode(context, batch):
        sys.exit("refused: llama_decode failed")
    rows = [numpy.ctypeslib.as_array(api.llama_get_logits_ith(context, i), shape=(count,)).copy() for i in range(7)]
    api.llama_free(context)
    return numpy.stack(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
