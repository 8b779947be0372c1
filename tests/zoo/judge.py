"""What is to be known of one model of the zoo: its sites, whether they are all, and what each method makes of them."""

from __future__ import annotations

import copy
import importlib
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import mmpeft
from mmpeft.errors import MMPEFTError, Refused
from mmpeft.functional.rows import take_rows
from mmpeft.methods import Method
from mmpeft.parts.base import Placement
from mmpeft.sites import Site, inputs_of, remember, structure
from mmpeft.sites.notes import Inputs
from mmpeft.sites.reading import read
from mmpeft.sites.watch import watch
from tests.support.moved import perturb
from tests.zoo.beside import peft_lora
from tests.zoo.coverage import PRODUCTS, coverage

LIBRARIES = {
    "timm": "tests.zoo.timm_models",
    "torchvision": "tests.zoo.torchvision_models",
    "diffusers": "tests.zoo.diffusers_models",
    "open_clip": "tests.zoo.open_clip_models",
    "transformers": "tests.zoo.hf",
}
CLOSE = 1e-4
"""How much a merged model may differ from the tuned one, of the largest output."""
SHUT = 1e-2
RANK = 2


METHODS = ("LoRA", "DoRA", "BitFit", "IA3", "Houlsby", "AdaptFormer", "PTuningV2", "LastBlocks")


def methods(found: list[Site]) -> dict[str, Method]:
    """The methods that are tried, LoRA and DoRA at every product inside blocks."""
    everywhere = all_projections(found)
    return {
        "LoRA": mmpeft.LoRA(at=everywhere, rank=RANK),
        "DoRA": mmpeft.DoRA(at=everywhere, rank=RANK),
        "BitFit": mmpeft.BitFit(),
        "IA3": mmpeft.IA3(),
        "Houlsby": mmpeft.Houlsby(),
        "AdaptFormer": mmpeft.AdaptFormer(bottleneck=16),
        "PTuningV2": mmpeft.PTuningV2(tokens=2),
        "LastBlocks": mmpeft.LastBlocks(),
    }


def all_projections(found: list[Site]) -> str:
    """A selector of every product inside blocks that can be tuned; of all where there are no blocks."""
    usable = [s for s in found if s.kind in PRODUCTS and s.role not in ("head", "embed", "time")]
    usable = [s for s in usable if s.depth >= 0] or usable
    refused = dict.fromkeys(s.path for s in usable if s.refuse)
    inside = "depth>=0 & " if any(s.depth >= 0 for s in usable) else ""
    apart = "".join(f" & path!={path}" for path in refused)
    kinds = dict.fromkeys(s.kind for s in usable if not s.refuse)
    roles = "" if inside else " & role!=head & role!=embed & role!=time"
    return " | ".join(f"{inside}kind={kind}{roles}{apart}" for kind in kinds)


def judge(library: str, name: str, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """The row of one model; without a name, nothing. `only` names the methods to try, by default all and HF PEFT's."""
    models = importlib.import_module(LIBRARIES[library])
    if not name:
        return {}
    only = only or (models.tried(name) if hasattr(models, "tried") else ())
    row: dict[str, Any] = {"name": name, "error": {}}
    start = time.perf_counter()
    try:
        step = "build"
        model = alive(models.build(name))
        row["class"], row["parameters"] = type(model).__name__, sum(p.numel() for p in model.parameters())
        row["build_s"] = _since(start)
        step = "inputs"
        inputs = inputs_of(model)
        if inputs is None:
            raise ValueError("nothing is known of its inputs")
        step = "watch"
        began = time.perf_counter()
        record = watch(model, *inputs)
        remember(model, read(model, record))
        found = structure(model)
        row |= {"watch_s": _since(began), "watch": "real" if record.real else "fake", "operations": len(record.ops)}
    except Exception as error:
        row["error"][step] = says(error)
        return row
    row |= {"sites": sum(site.kind != "module" for site in found), "kinds": Counter(site.role for site in found)}
    row |= {"blocks": row["kinds"].get("block", 0), "towers": sorted({site.tower for site in found} - {""})}
    row |= coverage(record, found, dict(model.named_parameters(remove_duplicate=False)))
    del record
    trial = Trial(lambda: alive(models.build(name)), model, inputs)
    try:
        trial.plain = trial.answer(model)
    except Exception as error:
        row["error"]["run"] = says(error)
        return row
    row["methods"] = {k: trial.of(m) for k, m in methods(found).items() if not only or k in only}
    if not only:
        row["peft"] = peft_lora(trial.fresh(), trial.loss)
    return {**row, "seconds": _since(start)}


def alive(model: nn.Module) -> nn.Module:
    """A model in evaluation mode without gates that are shut at the start (scales of zero or near it): behind those
    nothing learns before they open, whatever the method."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() and parameter.abs().max() < SHUT:
                parameter.copy_(0.2 * torch.rand(parameter.shape, generator=generator) + 0.1)
    return model.eval()


class Trial:
    """Tries methods on copies of one model."""

    def __init__(self, build: Callable[[], nn.Module], model: nn.Module, inputs: Inputs) -> None:
        self.build, self.model, self.inputs = build, model, inputs
        self.plain: list[Tensor] = []

    def fresh(self) -> nn.Module:
        """A model that no method has touched."""
        try:
            return copy.deepcopy(self.model)
        except Exception:  # some hold tensors that cannot be copied
            return self.build()

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Every floating tensor that a pass gives, with the same random numbers each time."""
        torch.manual_seed(0)
        model.train().eval()  # some of timm's keep in evaluation what they made of their parameters, until they train
        args, kwargs = copy.deepcopy(self.inputs)
        return [
            t for t in tree_leaves(_opened(model(*args, **kwargs))) if isinstance(t, Tensor) and t.is_floating_point()
        ]

    @torch.no_grad()
    def answer(self, model: nn.Module) -> list[Tensor]:
        """What a pass gives.

        Raises:
            ValueError: no tensors, or some that are not finite.
        """
        found = self.outputs(model)
        if not found or not all(torch.isfinite(t).any() for t in found if t.numel()):
            raise ValueError("a pass gives no finite floating tensors")
        return [t.nan_to_num(0.0, 0.0, 0.0) for t in found]  # some mask with minus infinity

    def loss(self, model: nn.Module) -> Tensor:
        """A fixed random projection of all outputs: the plain sum of what a norm gives never changes."""
        found = [t.float() for t in self.outputs(model) if t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        weighed = (t * torch.randn(t.shape, generator=generator) for t in found)
        return torch.stack([t.where(torch.isfinite(t), 0.0).sum() for t in weighed]).sum()

    def slopes(self, tuning: mmpeft.Tuning) -> dict[str, Tensor | None]:
        """Gradients of the plain model's own tensors, merged with the tuning where that can be: so words are routed."""
        with tempfile.TemporaryDirectory() as folder:
            tuning.save(Path(folder))
            model = self.fresh()
            try:
                mmpeft.load(model, folder).merge()
            except MMPEFTError:
                model = self.fresh()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.loss(model).backward()
        return {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}

    @staticmethod
    def rests(placement: Placement, slopes: dict[str, Tensor | None]) -> bool:
        """Whether the plain model learns nothing there either: its own tensor gets no gradient in exact arithmetic."""
        hook = placement.hooks[0]
        own = slopes.get(f"{hook.path}.{hook.name or 'weight'}".lstrip("."))
        if own is not None and getattr(placement.part, "transposed", False):
            own = own.t()
        return own is None or not take_rows(own, getattr(placement.part, "rows", None)).any()

    def of(self, method: Method) -> dict[str, Any]:
        """`ok`, `refused` with the reason, or `FAIL` with what went wrong."""
        try:
            return self._of(method)
        except Exception as error:
            return {"state": "FAIL", "why": says(error)}

    def _of(self, method: Method) -> dict[str, Any]:
        model = self.fresh()
        try:
            tuning = mmpeft.attach(model, method)
        except MMPEFTError as error:
            return {"state": "refused", "why": str(error)}
        perturb(tuning)
        self.loss(model).backward()
        dead = [p for p in tuning.placements if any(t.grad is None or not t.grad.any() for t in p.part.parameters())]
        slopes = self.slopes(tuning) if dead else {}
        rests = [placement for placement in dead if self.rests(placement, slopes)]
        dead = [placement for placement in dead if placement not in rests]
        found: dict[str, Any] = {"state": "ok", "parts": len(tuning.placements), "rests": len(rests)}
        if dead:
            return {
                **found,
                "state": "FAIL",
                "why": f"{len(dead)} of {len(tuning.placements)} parts have tensors without gradient: {_named(dead)}",
            }
        tuned = self.answer(model)
        if distance(tuned, self.plain) == 0:
            return {**found, "state": "FAIL", "why": "it changes nothing"}
        with tempfile.TemporaryDirectory() as folder:
            tuning.save(Path(folder))
            twin = self.fresh()
            mmpeft.load(twin, folder)
        far = distance(self.answer(twin), tuned)
        if far > CLOSE:
            return {**found, "state": "FAIL", "why": f"loaded from its file it differs by {far:.1e}"}
        try:
            tuning.merge()
        except Refused as error:
            return {**found, "merged": str(error)}
        far = distance(self.answer(model), tuned)
        if far > CLOSE:
            return {**found, "state": "FAIL", "why": f"merged it differs by {far:.1e}"}
        return found


def _named(placements: list[Placement]) -> str:
    return ", ".join(f"{p.home}.{p.key}" for p in placements[:4])


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, of the largest value."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in zip(one, other) if a.numel())


def _opened(out: Any) -> Any:
    return dict(vars(out)) if hasattr(out, "__dict__") and not isinstance(out, Tensor | dict) else out


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


def says(error: Exception) -> str:
    """The error and the last places outside torch that led to it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-3:][::-1])
    return f"{type(error).__name__}: {str(error).strip()[:400]} [{where}]"
