"""Inference: what a linear costs more by an adapter, many adapters in one batch, attaching them, choosing one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families import RANK, Family
from timing import Setting, Spread, Step, interleaved, kernel_calls, table
from torch import Tensor, nn

import mmpeft
from mmpeft.sites import Site, anatomy

LINEARS = 8
WIDTHS = {64: 200, 1024: 20}
"""Width of a linear: calls in a turn."""
KINDS = ("LoRA", "DoRA")


class Chain(nn.Module):
    """Linears one behind the other."""

    def __init__(self, width: int, linears: int = LINEARS) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(linears))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = linear(x)
        return x


Chain.__module__ = "benchmark"
anatomy("benchmark.Chain")(
    lambda model: [Site(f"linears.{i}", "attn.q", i, kind="linear") for i in range(len(model.linears))]
)


def _chain(setting: Setting, width: int, linears: int = LINEARS) -> Chain:
    torch.manual_seed(0)
    return Chain(width, linears).to(setting.device).requires_grad_(False).eval()


def _method(kind: str, at: str) -> mmpeft.Method:
    return (mmpeft.LoRA if kind == "LoRA" else mmpeft.DoRA)(rank=RANK, alpha=RANK, at=at)


def _config(targets: str, dora: bool = False) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, use_dora=dora)


@torch.no_grad()
def _trained(model: nn.Module) -> nn.Module:
    """As after training: no factor is zero any more, and adapters of one model differ."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            parameter.normal_(std=0.05)
    return model.eval()


# -- one token ----------------------------------------------------------------------------------------------


@torch.no_grad()
def decoding(setting: Setting) -> dict[str, Any]:
    """Microseconds that a linear takes more with an adapter, on one row, in evaluation."""
    from peft import get_peft_model

    figures: dict[str, Any] = {}
    rows = []
    for width, calls in WIDTHS.items():
        models: dict[str, nn.Module] = {"base": _chain(setting, width)}
        for kind in KINDS:
            models[f"ours {kind}"] = own = _chain(setting, width)
            mmpeft.attach(own, _method(kind, "attn.q"))
            _trained(own)
            peer = get_peft_model(_chain(setting, width), _config(r"linears\.\d+", kind == "DoRA"))
            models[f"PEFT {kind}"] = _trained(peer).base_model.model  # without the wrapper's own call
        x = torch.randn(1, width, device=setting.device)
        steps: dict[str, Step] = {name: lambda model=model, x=x: model(x) for name, model in models.items()}
        turns = interleaved(steps, setting, 3 * setting.rounds, 2 if setting.quick else calls)
        scale = 1e6 / LINEARS
        for name in models:
            added = turns.added(name, "base", scale)
            kernels = kernel_calls(steps[name]) / LINEARS
            figures[f"{name}, width {width}"] = {
                "µs": turns.time(name, scale),
                "added": added,
                "kernels": kernels,
                "µs ÷ LoRA": turns.ratio(name, "ours LoRA"),
            }
            shown = "" if name == "base" else f"{added:.1f}"
            rows.append([f"{name}, width {width}", f"{turns.time(name, scale):.1f}", shown, f"{kernels:.0f}"])
    setting.say("\n### One token decoded, a linear\n")
    setting.say(table(("", "µs", "µs added", "kernels"), rows))
    return figures


# -- many adapters ------------------------------------------------------------------------------------------


@torch.no_grad()
def many(family: Family, setting: Setting) -> dict[str, Any]:
    """Attach up to 64 adapters to one model, then run batches of 64 rows under 1, 8 and 64 of them."""
    most = 8 if setting.quick else 64
    counts = [n for n in (1, 8, 64) if n <= most]
    names = [f"a{i}" for i in range(most)]
    figures: dict[str, Any] = {}
    ours, attached = _attach_ours(family, setting, names)
    peers, added = _attach_peers(family, setting, names)
    rows = []
    for who, seconds in (("ours", attached), ("PEFT", added)):
        total = {n: sum(seconds[:n]) for n in counts}
        last = Spread.of(seconds[-4:]).median / Spread.of(seconds[:4]).median
        figures[f"attach, {who}"] = {"seconds": seconds, "last ÷ first": last}
        rows.append([who, *(f"{total[n]:.3f}" for n in counts), f"{last:.2f}"])
    setting.say("\n### Attaching adapters, seconds\n")
    setting.say(table(("", *map(str, counts), "the last ÷ the first (medians of four)"), rows))
    rows = []
    for length in (32, 1):
        words = torch.randint(1000, (most, length), device=setting.device)
        runs = _ours(ours, words, names, counts) | _peers(peers, words, names, counts)
        _check(runs, most)
        turns = interleaved(runs, setting, calls=1 if length > 1 or setting.quick else 5)
        for name, run in runs.items():
            speed, kernels = turns.ratio(f"{name.split()[0]} one", name), kernel_calls(run)
            figures[f"{name}, {length} tokens"] = {
                "seconds": turns.time(name),
                "throughput ÷ one's": speed,
                "kernels": kernels,
            }
            rows.append([f"{name}, {length} token(s)", f"{turns.time(name, 1e3):.0f}", f"{speed:.3f}", f"{kernels:,}"])
    setting.say(f"\n### A batch of {most} rows under several adapters: {family.title.split(',')[0]}, all linears\n")
    setting.say(table(("", "ms", "throughput ÷ that of one adapter", "kernels"), rows))
    return figures


def _attach_ours(family: Family, setting: Setting, names: list[str]) -> tuple[nn.Module, list[float]]:
    model, seconds = family.fresh().eval(), []
    for name in names:
        start = setting.now()
        mmpeft.attach(model, _method("LoRA", family.ours["all"]), name)
        seconds.append(setting.now() - start)
    return _trained(model), seconds


def _attach_peers(family: Family, setting: Setting, names: list[str]) -> tuple[Any, list[float]]:
    from peft import get_peft_model

    model, seconds = family.fresh().eval(), []
    for name in names:
        start = setting.now()
        if name == names[0]:
            model = get_peft_model(model, _config(family.peft["all"]), name)
        else:
            model.add_adapter(name, _config(family.peft["all"]))  # type: ignore[operator]
        seconds.append(setting.now() - start)
    for key, parameter in model.named_parameters():  # PEFT freezes those not in use
        parameter.requires_grad_("lora_" in key)
    return _trained(model), seconds


def _ours(model: nn.Module, words: Tensor, names: list[str], counts: list[int]) -> dict[str, Callable[[], Tensor]]:
    def run(route: str | list[str]) -> Tensor:
        with mmpeft.use(model, route):
            return model(input_ids=words, use_cache=False).logits  # type: ignore[no-any-return]

    routes: dict[str, str | list[str]] = {"ours one": names[0]}
    routes |= {f"ours {n} in the batch": _cycled(names, n, len(words)) for n in counts}
    return {name: lambda route=route: run(route) for name, route in routes.items()}


def _peers(model: Any, words: Tensor, names: list[str], counts: list[int]) -> dict[str, Callable[[], Tensor]]:
    model.set_adapter(names[0])
    runs = {"PEFT one": lambda: model(input_ids=words, use_cache=False).logits}
    for n in counts:
        given = _cycled(names, n, len(words))
        runs[f"PEFT {n} in the batch"] = lambda given=given: (
            model(input_ids=words, use_cache=False, adapter_names=given).logits
        )
    return runs


def _cycled(names: list[str], distinct: int, rows: int) -> list[str]:
    return [names[i % distinct] for i in range(rows)]


def _check(runs: dict[str, Callable[[], Tensor]], most: int) -> None:
    """Only right results are worth timing: the first row is the first adapter's, the others' differ from it."""
    for who in ("ours", "PEFT"):
        alone, mixed = runs[f"{who} one"](), runs[f"{who} {most} in the batch"]()
        torch.testing.assert_close(mixed[0], alone[0], rtol=1e-3, atol=1e-3)
        if (mixed[1:] - alone[1:]).abs().flatten(1).amax(1).min() < 1e-2:
            raise AssertionError(f"{who}: a row did not get its own adapter")


# -- choosing -----------------------------------------------------------------------------------------------


@torch.no_grad()
def routing(setting: Setting) -> dict[str, Any]:
    """Microseconds of choosing an adapter, and of a tiny model's forward under a choice."""
    from peft import get_peft_model

    figures: dict[str, Any] = {}
    rows = []
    for linears in (4, 56):
        base, ours = _chain(setting, 64, linears), _chain(setting, 64, linears)
        for name in ("a", "b"):
            mmpeft.attach(ours, _method("LoRA", "attn.q"), name)
        peers = get_peft_model(_chain(setting, 64, linears), _config(r"linears\.\d+"), "a")
        peers.add_adapter("b", _config(r"linears\.\d+"))
        _trained(ours), _trained(peers)
        steps = _choices(base, ours, peers, torch.randn(2, 64, device=setting.device))
        turns = interleaved(steps, setting, 3 * setting.rounds, 2 if setting.quick else 2000 // linears)
        for name in steps:
            figures[f"{name}, {linears} linears"] = turns.time(name, 1e6)
        rows.append([f"{linears} linears", *(f"{turns.time(name, 1e6):.1f}" for name in steps)])
    setting.say("\n### Choosing an adapter, µs\n")
    setting.say(table(("", *steps), rows))
    return figures


def _choices(base: nn.Module, ours: nn.Module, peers: Any, x: Tensor) -> dict[str, Step]:
    mixed = ["a", "b"]

    def choose(which: str | list[str]) -> None:
        with mmpeft.use(ours, which):
            pass

    def forward(which: str | list[str]) -> None:
        with mmpeft.use(ours, which):
            ours(x)

    def switch() -> None:
        peers.set_adapter("b")
        peers.set_adapter("a")

    inner = peers.base_model.model
    return {
        "base forward": lambda: base(x),
        "ours, forward": lambda: ours(x),
        "ours, `with use(model, name)`": lambda: choose("a"),
        "ours, forward in it": lambda: forward("a"),
        "ours, `with use(model, [name a row])`": lambda: choose(mixed),
        "ours, a forward in that": lambda: forward(mixed),
        "PEFT, forward": lambda: inner(x),
        "PEFT, `set_adapter` there and back": switch,
        "PEFT, forward, `adapter_names=`": lambda: peers(x, adapter_names=mixed),
    }
