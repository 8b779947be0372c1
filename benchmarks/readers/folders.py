"""Folders for MLX and AdapterHub in the hands of their own libraries, both ways, as a table.

    python -m benchmarks.readers.folders [--mlx PYTHON] [--adapters PYTHON] [--write docs/readers.md]

PYTHON is an interpreter that has `mlx_lm`, or `adapters`. What is written here is read there, and what is made there
is loaded here; a number is the relative error of the change of the answers, ‖theirs - ours‖ / ‖ours‖.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import mmpeft
from benchmarks.readers.language import METHODS, SIZES, judged, llama
from benchmarks.readers.page import put
from mmpeft.errors import MMPEFTError
from mmpeft.formats.exchange import load_foreign

START, END = "<!-- folders: python -m benchmarks.readers.folders -->", "<!-- end of folders -->"
IDS = torch.arange(1, 9)[None]


def gpt2() -> nn.Module:
    words = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=48, n_embd=64, n_layer=2, n_head=2, n_positions=64, n_ctx=64, **words)
    )


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))


def roberta() -> nn.Module:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES))


NETWORK: dict[str, mmpeft.Method] = {
    "LoRA, q, k, v and network": mmpeft.LoRA(at="attn.{q,k,v}|mlp.{up,down}", rank=4, alpha=6),
    "LoRA, last block": mmpeft.LoRA(at="attn.q & depth=1", rank=4),
    "Houlsby": mmpeft.Houlsby(reduction=4),
    "Houlsby, behind attention in one block": mmpeft.Houlsby(at="attn & depth=1", bottleneck=7, activation="tanh"),
    "Pfeiffer": mmpeft.Pfeiffer(reduction=4),
    "Pfeiffer, behind blocks": mmpeft.Pfeiffer(at="block", reduction=4),
    "parallel": mmpeft.ParallelAdapter(),
    "parallel, learned scale": mmpeft.ParallelAdapter(at="{attn,mlp}", scale="scalar"),
    "AdaptFormer": mmpeft.AdaptFormer(),
    "(IA)³ on results": mmpeft.IA3(at="attn.{k,v}|mlp.up", side="output"),
    "Compacter": mmpeft.Compacter(reduction=4),
    "prefix": mmpeft.PrefixTuning(),
}
WHOLE: dict[str, mmpeft.Method] = {"norms": mmpeft.NormTuning(), "full": mmpeft.Full()}
Program = tuple[str, dict[str, Callable[[], nn.Module]], dict[str, mmpeft.Method], Sequence[str]]
PROGRAMS: dict[str, Program] = {
    "mlx": ("mlx_program.py", {"Llama": llama, "GPT-2": gpt2}, METHODS | WHOLE, ("lora", "dora", "lora table", "full")),
    "adapterhub": (
        "adapters_program.py",
        {"BERT": bert, "RoBERTa": roberta, "GPT-2": gpt2, "Llama": llama},
        {name: METHODS[name] for name in ("LoRA", "LoRA, two ranks", "DoRA", "(IA)³")} | NETWORK,
        (
            *("double_seq_bn", "double_seq_bn, by block", "double_seq_bn, left out", "seq_bn", "par_bn"),
            *("par_bn, learned", "lora", "lora, all", "dora", "ia3", "compacter", "prefix_tuning", "loreft"),
        ),
    ),
}


def rows(format: str, kind: str, python: Path) -> list[tuple[str, str, str]]:
    """Direction, method and what became of it, for one model."""
    script, models, methods, made = PROGRAMS[format]
    torch.manual_seed(0)
    model: Any = models[kind]().eval()
    found: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        base = Path(scratch) / "base"
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05
        _save(model, base, format)
        before = model(IDS).logits
        changes: dict[str, Tensor] = {}
        jobs = []
        for i, (name, method) in enumerate(methods.items()):
            job = {"verb": "read", "folder": f"{scratch}/{i}", "out": f"{scratch}/{i}.safetensors", "kind": name}
            try:
                tuning = mmpeft.attach(model, method)
            except MMPEFTError:
                continue  # Llama has no biases
            for parameter in tuning.parameters():
                parameter += torch.randn_like(parameter) * 0.1
            changes[name] = model(IDS).logits - before
            try:
                tuning.export(job["folder"], format=format)  # type: ignore[arg-type]
                jobs.append(job)
            except MMPEFTError as error:
                found.append(("written", name, f"not written: {error}"))
            tuning.detach()
        for name in made:
            own = f"{scratch}/{name.replace(', ', '-').replace(' ', '-')}"
            jobs.append({"verb": "write", "folder": own, "out": f"{own}.safetensors", "kind": name})
        (Path(scratch) / "jobs.json").write_text(json.dumps(jobs))
        command = [str(python), str(Path(__file__).with_name(script)), str(base), f"{scratch}/jobs.json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        for job in jobs:
            way = "written" if job["verb"] == "read" else "read"
            found.append((way, job["kind"], _result(model, before, job, changes)))
    return found


def _save(model: Any, base: Path, format: str) -> None:
    """The base as its reader finds it: mlx_lm knows GPT-2 by the names that it was published with."""
    inner = getattr(model, "transformer", None) if format == "mlx" else None
    (inner if inner is not None else model).save_pretrained(base)
    model.config.save_pretrained(base)


def _result(model: Any, before: Tensor, job: dict[str, str], changes: dict[str, Tensor]) -> str:
    refusal = Path(job["out"]).with_suffix(".txt")
    if refusal.exists():
        return f"refused there: {refusal.read_text()}"
    theirs = load_file(job["out"])
    change = theirs["logits.tuned"] - theirs["logits.base"]
    if job["verb"] == "read":
        return judged({"logits": changes[job["kind"]]}, {"logits": change})
    try:
        tuning = load_foreign(model, job["folder"])
    except MMPEFTError as error:
        return f"refused here: {error}"
    ours = model(IDS).logits - before
    tuning.detach()
    return judged({"logits": change}, {"logits": ours})


def section(found: dict[str, dict[str, list[tuple[str, str, str]]]], versions: dict[str, str]) -> str:
    """A section of a page: for each format methods by models, written and read."""
    lines = [
        START,
        "",
        f"Run on {datetime.date.today()}: {', '.join(versions.values())}, tiny models of random weights.",
    ]
    for format, models in found.items():
        for way, title in (("written", "written here, run there"), ("read", "made there, loaded here")):
            cells = {(m, k): said.partition(":")[0] for k, own in models.items() for w, m, said in own if w == way}
            lines += ["", f"### `{format}`, {title}", "", f"| |{'|'.join(models)}|", "|---" * (1 + len(models)) + "|"]
            for method in dict.fromkeys(method for method, _ in cells):
                lines.append(f"|{method}|{'|'.join(cells.get((method, kind), '–') for kind in models)}|")
    return "\n".join([*lines, "", END]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser("python -m benchmarks.readers.folders", description=__doc__)
    parser.add_argument("--mlx", type=Path, metavar="PYTHON")
    parser.add_argument("--adapters", type=Path, metavar="PYTHON")
    parser.add_argument("--write", type=Path, help="page to put the table into, between its marks")
    options = parser.parse_args(argv)
    found: dict[str, dict[str, list[tuple[str, str, str]]]] = {}
    versions = {}
    for format, package, python in (("mlx", "mlx_lm", options.mlx), ("adapterhub", "adapters", options.adapters)):
        if python is None:
            continue
        ask = f"from importlib.metadata import version; print(version({package!r}))"
        said = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
        versions[format] = f"{package} {said}"
        found[format] = {kind: rows(format, kind, python) for kind in PROGRAMS[format][1]}
        for kind, own in found[format].items():
            for row in own:
                print(format, kind, *row, sep=" | ", file=sys.stderr, flush=True)
    text = section(found, versions)
    if options.write:
        put(text, options.write)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
