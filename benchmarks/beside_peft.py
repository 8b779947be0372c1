"""Four backbones tuned by mmpeft, by HF PEFT and at the floor, in one run: time, bytes, kernels.

    python benchmarks/beside_peft.py [--parts train decode many route] [--families vit clip unet llama] [--rounds 7]

Everything that is compared runs in turn in one process; figures are medians with their least and greatest in brackets,
ratios are formed turn by turn. The *floor* is the frozen backbone where one parameter at its input trains: a full
forward and a full input-gradient backward pass. Bytes (each storage once, parameters excluded) and kernel calls
(operators that are no views) are counted and do not vary. On one CPU thread the seconds are those of the process.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import serving
import torch
import training
from families import FAMILIES
from timing import Setting, Spread, table

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- beside_peft: begin -->", "<!-- beside_peft: end -->"
PARTS = ("train", "decode", "many", "route")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows that everything runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/benchmarks.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    device = torch.device(args.device)
    setting = Setting(device, 1 if args.quick else args.rounds, args.quick)
    setting.say(_header(setting))
    found: dict[str, Any] = {}
    if "train" in args.parts:
        found["train"] = {name: training.measure(FAMILIES[name](device, args.quick), setting) for name in args.families}
    if "decode" in args.parts:
        found["decode"] = serving.decoding(setting)
    if "many" in args.parts:
        found["many"] = serving.many(FAMILIES["llama"](device, args.quick), setting)
    if "route" in args.parts:
        found["route"] = serving.routing(setting)
    if not args.quick:
        setting.say("\n### Goals\n")
        setting.say(table(("goal", "reached", ""), goals(found)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1, default=asdict, ensure_ascii=False))
    if args.docs:
        before, _, rest = DOCS.read_text("utf-8").partition(BEGIN)
        DOCS.write_text(
            before + BEGIN + "\n" + "\n".join(setting.said).strip() + "\n" + END + rest.partition(END)[2], "utf-8"
        )


def _header(setting: Setting) -> str:
    import peft

    where = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "CPU"
    return (
        f"{where}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, peft {peft.__version__}, "
        f"{setting.rounds} round(s){', quick' if setting.quick else ''}"
    )


def goals(found: dict[str, Any]) -> list[list[str]]:
    """What is held to, as far as it was measured: text, figure, whether it is met."""
    rows = []

    def goal(text: str, figure: float | Spread, most: float | None = None, least: float = 0.0) -> None:
        middle = figure.median if isinstance(figure, Spread) else figure
        met = middle <= most if most is not None else middle >= least
        limit = f"≥ {least:g}" if most is None else f"≤ {most:g}"
        rows.append([f"{text} {limit}", f"{figure:.3f}", "met" if met else "missed"])

    for name, figures in found.get("train", {}).items():
        lora, dora, peer = (figures[key] for key in ("ours LoRA all", "ours DoRA all", "PEFT LoRA all"))
        lean = figures["ours LoRA all, pointwise"]
        goal(f"{name}: LoRA step ÷ PEFT's", lora["step ÷ PEFT"], 0.95)
        goal(f"{name}: LoRA step ÷ floor", lora["step ÷ floor"], 1.06)
        goal(f"{name}: bytes kept ÷ PEFT's", lora["kept"] / peer["kept"], 1.0)
        goal(f"{name}: bytes kept under bf16 autocast ÷ PEFT's", lora["kept bf16"] / peer["kept bf16"], 1.0)
        goal(f"{name}: bytes kept, pointwise, ÷ floor", lean["kept"] / figures["floor"]["kept"], 1.15)
        goal(f"{name}: DoRA step ÷ LoRA step", dora["step ÷ LoRA"], 1.15)
        goal(f"{name}: DoRA evaluation ÷ LoRA evaluation", dora["evaluation ÷ LoRA"], 1.15)
    decode = found.get("decode", {})
    for width in serving.WIDTHS if decode else ():
        lora, dora = (decode[f"ours {kind}, width {width}"] for kind in serving.KINDS)
        goal(f"one token, width {width}: µs of DoRA ÷ LoRA", dora["µs ÷ LoRA"], 1.15)
        goal("the same, µs added by DoRA ÷ by LoRA", dora["added"].median / lora["added"].median, 1.15)
        for kind, own in zip(serving.KINDS, (lora, dora), strict=True):
            peer = decode[f"PEFT {kind}, width {width}"]
            goal(f"one token, width {width}: {kind} adds ÷ PEFT's", own["added"].median / peer["added"].median, 1.0)
    many = found.get("many", {})
    for name in many:
        if name.startswith("ours 64 in the batch"):
            goal(f"{name}: throughput ÷ one's", many[name]["throughput ÷ one's"], least=0.9)
    if many:
        first = [sum(many[f"attach, {who}"]["seconds"][:4]) for who in ("ours", "PEFT")]
        goal("attaching the first four ÷ PEFT's", first[0] / first[1], 0.2)
        goal("the last attach ÷ the first", many["attach, ours"]["last ÷ first"], 1.2)
    return rows


if __name__ == "__main__":
    main()
