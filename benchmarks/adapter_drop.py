"""Time of a training step and of inference with adapters left out below: `python benchmarks/adapter_drop.py`.

Adapters in every block of a timm ViT with random weights; medians over alternating rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch
from rich.console import Console
from rich.table import Table

import mmpeft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model = timm.create_model(options.model, pretrained=False).eval().to(options.device)
    x = torch.randn(options.batch, 3, *model.patch_embed.img_size, device=options.device)
    tuning = mmpeft.attach(model, mmpeft.AdapterDrop())
    dropped = [round(share * len(model.blocks)) for share in (0, 0.25, 0.5, 0.75)] + [len(model.blocks) - 1]
    times: dict[tuple[int, str], list[float]] = {(n, what): [] for n in dropped for what in ("step", "inference")}

    def step() -> None:
        model(x).square().mean().backward()
        model.zero_grad(set_to_none=True)

    def inference() -> None:
        with torch.inference_mode():
            model(x)

    for _ in range(options.rounds + 1):
        for n in dropped:
            tuning.leave_out(n)
            for what, run in (("step", step), ("inference", inference)):
                start = time.perf_counter()
                run()
                if x.is_cuda:
                    torch.cuda.synchronize()
                times[n, what].append(time.perf_counter() - start)
    medians = {key: statistics.median(found[1:]) for key, found in times.items()}
    table = Table(title=f"AdapterDrop: {options.model}, batch {options.batch}, {options.device}")
    for column in ("blocks left out", "step ms", "speed-up", "inference ms", "speed-up"):
        table.add_column(column, justify="right")
    for n in dropped:
        cells = []
        for what in ("step", "inference"):
            cells += [f"{1e3 * medians[n, what]:.0f}", f"{medians[0, what] / medians[n, what]:.2f}x"]
        table.add_row(str(n), *cells)
    Console().print(table)
    start = time.perf_counter()
    for _ in range(20):
        tuning.leave_out(3)
    print(f"changing what rests: {50 * (time.perf_counter() - start):.2f} ms")


if __name__ == "__main__":
    main()
