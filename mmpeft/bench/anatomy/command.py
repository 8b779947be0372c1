"""`mmpeft sites MODEL`: where a model can be tuned, and where a method would sit."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from torch import nn

from mmpeft.bench.anatomy.fit import Fit, fit
from mmpeft.bench.anatomy.overview import overview, shape_of
from mmpeft.bench.anatomy.picture import draw
from mmpeft.bench.anatomy.table import tables
from mmpeft.errors import MMPEFTError
from mmpeft.files import write_atomic
from mmpeft.methods import Method
from mmpeft.run.written import read_method
from mmpeft.sites import Site, sites
from mmpeft.sites.named import Named, find_named
from mmpeft.sites.selector import select
from mmpeft.types import Json

EPILOG = """models:
  vit_base_patch16_224, timm:convnext_base, torchvision:resnet50    a name of timm or torchvision
  ViT-B-32, open_clip:convnext_base                                 a configuration of open_clip
  llama, folder/, meta-llama/Llama-3.2-1B                           transformers: a type, or a config.json
  UNet2DConditionModel, folder/, diffusers:stabilityai/sdxl-turbo   diffusers: a class, or a configuration
  embedded:vit_emoji                                                what ships with the suite
  my_project.models:build                                           your own: returns a model, or a model and a batch

Weights are not read; nothing is downloaded but the configuration of a repository."""


WIDTH = 140
"""Of what is written into a file or a pipe."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the sites of a model; 1 if a method that was asked for is refused."""
    parser = argparse.ArgumentParser(
        "mmpeft sites",
        description="Where a model can be tuned, found by watching one pass of it; nothing is trained.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="see below; a prefix such as timm: says whose name it is")
    parser.add_argument(
        "--method", default="", help="where this would sit: LoRA, 'LoRA(rank=8) + BitFit()', a YAML file"
    )
    parser.add_argument(
        "--at", default="", metavar="SELECTOR", help="only these sites, for the method too: 'attn.{q,v}'"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the model, the method's sites marked")
    parser.add_argument("--json", action="store_true", help="every site as JSON in place of tables")
    options = parser.parse_args(list(sys.argv[1:] if argv is None else argv)[1:])
    method = read_method(options.method) if options.method else None
    named = find_named(options.model)
    try:
        model, found, seconds, fitted = _looked_at(named, method, options.method, options.at, empty=True)
    except MMPEFTError:
        raise
    except Exception:  # it wants numbers to build, run or place: weights of its own
        model, found, seconds, fitted = _looked_at(named, method, options.method, options.at, empty=False)
    shown = select(found, options.at) if options.at else found
    seen = overview(options.model, model, found, seconds, shown)
    if options.picture is not None:
        write_atomic(options.picture, draw(overview(options.model, model, found, seconds, found), fitted))
    if options.json:
        print(json.dumps(_data(options.model, model, shown, seconds, fitted), indent=1))
    else:
        console = Console()
        if not console.is_terminal:  # nothing to fit into
            console = Console(width=WIDTH)
        console.print(tables(seen, fitted))
        if options.picture is not None:
            print(f"picture: {options.picture}")
    return int(fitted is not None and bool(fitted.refused))


def _looked_at(
    named: Named, method: Method | None, text: str, at: str, *, empty: bool
) -> tuple[nn.Module, list[Site], float, Fit | None]:
    model, example = named.build(empty=empty)
    start = time.perf_counter()
    try:
        found = sites(model, example)
    except MMPEFTError:
        if not empty:
            raise
        return _looked_at(named, method, text, at, empty=False)
    seconds = time.perf_counter() - start
    return model, found, seconds, fit(model, method, found, at, text) if method is not None else None


def _data(name: str, model: nn.Module, shown: Sequence[Site], seconds: float, fitted: Fit | None) -> Json:
    """Everything as plain data."""
    keys = ("path", "role", "tower", "depth", "kind", "rows", "via", "tensor", "refuse", "dead")
    listed = [
        {**{key: getattr(s, key) for key in keys}, "shape": shape_of(model, s)} for s in shown if s.role != "param"
    ]
    data: Json = {"model": name, "class": type(model).__name__, "seconds": round(seconds, 3), "sites": listed}
    data["parameters"] = sum(p.numel() for p in model.parameters())
    data["tensors"] = [site.path for site in shown if site.role == "param"]
    if fitted is not None:
        parts = [{k: getattr(seat, k) for k in ("role", "path", "tower", "parameters")} for seat in fitted.seats]
        data["method"] = {"method": fitted.method, "refused": fitted.refused, "trainable": fitted.trainable}
        data["method"] |= {"share": fitted.share, "parts": parts}
    return data
