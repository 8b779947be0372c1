"""PEFT folders of language models in the hands of those that read them, as a table.

    python -m benchmarks.readers.language [--llama-cpp DIR [--llama-cpp-library DIR]] [--vllm DIR] [--sglang DIR]
        [--models Llama Phi-3 Qwen2] [--write docs/readers.md]

PEFT and transformers are the installed ones; of the others DIR is a checkout (of vLLM and SGLang the folder that holds
their package). Rows and columns that are not run stay in the page as they were. Every reader runs on a base without the
adapter and says what it changes there; that is compared with what merging it here changes, as ‖theirs - ours‖ / ‖ours‖.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import mmpeft
from benchmarks.readers.page import put
from mmpeft.errors import MMPEFTError

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
ALL = "attn.*|mlp.*"
METHODS: dict[str, mmpeft.Method] = {
    "LoRA": mmpeft.LoRA(rank=4, alpha=6),
    "LoRA, all linears": mmpeft.LoRA(at=ALL, rank=4, alpha=6),
    "LoRA, two ranks": mmpeft.LoRA(at=ALL, rank=4, alpha=6, rank_pattern={"attn.q": 2}),
    "LoRA, queries alone": mmpeft.LoRA(at="attn.q", rank=4),
    "LoRA, table": mmpeft.LoRA(at="attn.{q,v}|embed", rank=4),
    "LoRA, head": mmpeft.LoRA(at="attn.{q,v}|head", rank=4),
    "DoRA": mmpeft.DoRA(rank=4),
    "LoHa": mmpeft.LoHa(at="attn.*", rank=2),
    "(IA)³": mmpeft.IA3(),
    "LoRA and norms": mmpeft.LoRA(rank=4) + mmpeft.NormTuning(),
    "LoRA and biases": mmpeft.LoRA(rank=4) + mmpeft.BitFit(create=False),
    "biases alone": mmpeft.BitFit(create=False),
}
Changes = dict[str, Tensor]
START, END = "<!-- language: python -m benchmarks.readers.language -->", "<!-- end of language -->"
LEGEND = """\
Random weights of tiny models; each reader runs on a base without the adapter and says what it changes there. vLLM and
SGLang run the files that read adapters, without their kernels. A number is the relative error of the change."""


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1))


def phi3() -> nn.Module:
    known = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "original_max_position_embeddings": 64}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES, **known))


def qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=1))


MODELS: dict[str, Callable[[], nn.Module]] = {"Llama": llama, "Phi-3": phi3, "Qwen2": qwen2}


class Unread(Exception):
    """A reader's own refusal."""


def by_peft(base: Path, folder: Path) -> tuple[Changes, Changes]:
    return _merged(base, PeftModel.from_pretrained(_load(base), str(folder)).merge_and_unload())


def by_transformers(base: Path, folder: Path) -> tuple[Changes, Changes]:
    """Its adapters are layers of PEFT's under their own loader; each is merged by itself."""
    model: Any = _load(base)
    model.load_adapter(str(folder))
    return _merged(base, _unloaded(model))


def _unloaded(model: Any) -> nn.Module:
    for path, module in list(model.named_modules()):
        held: Any = module
        if hasattr(held, "merge") and hasattr(held, "base_layer"):
            held.merge()
            model.set_submodule(path, held.get_base_layer())
        elif hasattr(held, "modules_to_save"):
            model.set_submodule(path, held.modules_to_save[next(iter(held.modules_to_save))])
    return model


def _load(base: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(base)


def _merged(base: Path, model: nn.Module) -> tuple[Changes, Changes]:
    before, wanted = load_file(base / "model.safetensors"), load_file(base / "merged" / "model.safetensors")
    after = model.state_dict()
    return {k: wanted[k] - t for k, t in before.items()}, {k: after[k] - t for k, t in before.items()}


def _program(script: str, *arguments: Path | str) -> Changes:
    """Run a reader in a process of its own; its answer lies in `OUT`, which is put in for the name."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.safetensors"
        own = [str(out) if argument == "OUT" else str(argument) for argument in arguments]
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script)), *own], capture_output=True, text=True
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["no word"]
            raise Unread(said[-1].removeprefix("refused: "))
        return load_file(out)


def by_server(program: str, source: Path) -> Callable[[Path, Path], tuple[Changes, Changes]]:
    def read(base: Path, folder: Path) -> tuple[Changes, Changes]:
        found = _program("servers.py", program, source, base, folder, "OUT")
        wanted, _ = _merged(base, _load(base))
        return wanted, {f"{key.removeprefix('delta.')}.weight": change for key, change in found.items()}

    return read


def by_llama_cpp(source: Path, library: Path | None) -> Callable[[Path, Path], tuple[Changes, Changes]]:
    def read(base: Path, folder: Path) -> tuple[Changes, Changes]:
        found = _program("llama_cpp.py", source, base, folder, "OUT", *([library] if library else []))
        names = [key.removeprefix("base.") for key in found if key.startswith("base.")]
        wanted = {name: found[f"merged.{name}"] - found[f"base.{name}"] for name in names}
        got = {name: found[f"delta.{name}"] for name in names if f"delta.{name}" in found}
        if library:  # the answers, beside the weights
            wanted["logits"] = found["logits.merged"] - found["logits.base"]
            got["logits"] = found["logits.tuned"] - found["logits.base"]
        return wanted, got

    return read


def judged(wanted: Changes, got: Changes) -> str:
    """How far the changes are from those that were written."""
    off = sum(float((got.get(k, torch.zeros_like(t)) - t).double().square().sum()) for k, t in wanted.items())
    off += sum(float(t.double().square().sum()) for k, t in got.items() if k not in wanted)
    whole = sum(float(t.double().square().sum()) for t in wanted.values())
    error = (off / whole) ** 0.5
    lost = [k for k, t in wanted.items() if t.any() and (k not in got or not got[k].any())]
    return "exact" if error < 1e-3 else f"{error:.2g}" + (f", *partly*: {len(lost)} tensors left out" if lost else "")


Cells = dict[tuple[str, str], dict[str, str]]
"""By model and method, what each reader made of it."""


def known(page: str) -> Cells:
    """The rows of a section of a page that was written before."""
    _, _, section = page.partition(START)
    lines = [line.strip("|").split("|") for line in section.partition(END)[0].splitlines() if line.startswith("|")]
    found: Cells = {}
    for line in lines[2:]:
        found[line[0], line[1]] = dict(zip(lines[0][2:], line[2:]))
    return found


def section(rows: Cells) -> str:
    """A section of a page: a column for each reader of any row."""
    columns = dict.fromkeys(column for cells in rows.values() for column in cells)
    lines = [START, "", LEGEND, "", f"|model|method|{'|'.join(columns)}|", "|---" * (2 + len(columns)) + "|"]
    order = [(kind, method) for kind in MODELS for method in METHODS if (kind, method) in rows]
    lines += [f"|{k}|{m}|{'|'.join(rows[k, m].get(column, 'not run') for column in columns)}|" for k, m in order]
    return "\n".join([*lines, "", END]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser("python -m benchmarks.readers.language", description=__doc__)
    for name in ("llama-cpp", "llama-cpp-library", "vllm", "sglang"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--write", type=Path, help="page to put the table into, between its marks")
    options = parser.parse_args(argv)
    readers: dict[str, Callable[[Path, Path], tuple[Changes, Changes]]] = {}
    readers |= {f"PEFT {version('peft')}": by_peft, f"transformers {version('transformers')}": by_transformers}
    if options.llama_cpp:
        readers["llama.cpp"] = by_llama_cpp(options.llama_cpp, options.llama_cpp_library)
    readers |= {n: by_server(n, getattr(options, n)) for n in ("vllm", "sglang") if getattr(options, n)}
    rows = known(options.write.read_text("utf-8")) if options.write and options.write.exists() else {}
    for kind in options.models:
        for method in METHODS:
            with tempfile.TemporaryDirectory() as scratch:
                cells = _row(kind, method, readers, Path(scratch))
            if cells:
                print(kind, method, *cells, sep=" | ", file=sys.stderr, flush=True)
                rows.setdefault((kind, method), {}).update(zip(readers, cells))
    if options.write:
        put(section(rows), options.write)
    else:
        print(section(rows))
    return 0


def _row(kind: str, method: str, readers: dict[str, Any], folder: Path) -> list[str]:
    torch.manual_seed(0)
    model: Any = MODELS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder / "base")
    try:
        tuning = mmpeft.attach(model.eval(), METHODS[method])
    except MMPEFTError:
        return []  # Llama has no biases
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    try:
        tuning.export(folder / "adapter")
    except MMPEFTError as error:
        print(f"{kind}, {method}: not written: {error}", file=sys.stderr)
        return ["not written"] * len(readers)
    tuning.save_merged(folder / "base" / "merged")
    cells = []
    for read in readers.values():
        try:
            cells.append(judged(*read(folder / "base", folder / "adapter")))
        except Unread as error:
            print(f"{kind}, {method}: refused: {str(error)[:300]}", file=sys.stderr)
            cells.append("refused")
    return cells


if __name__ == "__main__":
    sys.exit(main())
