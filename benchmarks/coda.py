"""Inference time of CoDA by the number of tokens its blocks run on: `python benchmarks/coda.py`.

A timm ViT with random weights; times are medians over alternating rounds, so that other load falls on all alike.
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
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model = timm.create_model(options.model, pretrained=False).eval().to(options.device)
    x = torch.randn(options.batch, 3, *model.patch_embed.img_size, device=options.device)
    routes: dict[str | None, int] = {None: 1}
    for reduction in (1, 2, 3, 4, 8):
        routes[f"n_{reduction}"] = reduction
        mmpeft.attach(model, mmpeft.CoDA(reduction=reduction), f"n_{reduction}")
    times: dict[str | None, list[float]] = {route: [] for route in routes}

    def once() -> None:
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    with torch.inference_mode():
        for _ in range(options.rounds + 1):
            for route in routes:
                with mmpeft.use(model, route):
                    once() if x.is_cuda else None
                    start = time.perf_counter()
                    once()
                    times[route].append(time.perf_counter() - start)
    tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    table = Table(title=f"CoDA: {options.model}, batch {options.batch}, {tokens} tokens, {options.device}")
    for column in ("k", "tokens", "ms", "of k = n", "speed-up"):
        table.add_column(column, justify="right")
    medians = {route: statistics.median(found[1:]) for route, found in times.items()}
    for route, reduction in routes.items():
        ratio = medians["n_1"] / medians[route]
        name = "no adapter" if route is None else "n" if reduction == 1 else f"n/{reduction}"
        ran = str(-(-tokens // reduction))
        table.add_row(name, ran, f"{1e3 * medians[route]:.1f}", f"{1 / ratio:.2f}", f"{ratio:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
