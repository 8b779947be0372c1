"""Values that no adapter can have, and damaged files: refused by name, before the model is changed."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import AdapterFileError, ConfigError
from mmpeft.formats.content import Layer
from mmpeft.formats.exchange import convert, read
from mmpeft.hosting.values import unfit
from mmpeft.surgery.state import state_of
from tests.support.moved import perturb
from tests.unit.toy import Toy

LORA = mmpeft.LoRA(rank=2, at="attn.q|mlp.up")
NAN, INF = float("nan"), float("inf")


def _host() -> nn.Module:
    """A model with two tunings and a route through both; a failed load must leave it so."""
    model = Toy()
    mmpeft.attach(model, LORA, name="a")
    mmpeft.attach(model, mmpeft.BitFit(), name="b")
    mmpeft.use(model, ["a", "b", None])
    return model


def _told(model: nn.Module) -> Any:
    state = state_of(model)
    facts = None if state is None else (list(state.placements), state.route, sorted(state.hosts))
    flags = [(name, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    return facts, [type(m) for m in model.modules()], flags


def _equal(a: Any, b: Any) -> bool:
    same = a[:2] == b[:2] and len(a[2]) == len(b[2])
    return same and all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a[2], b[2]))


def _refused(load: Callable[[nn.Module], Any], match: str) -> None:
    for model in (Toy(), _host()):
        before = _told(model)
        with pytest.raises(AdapterFileError, match=match):
            load(model)
        assert _equal(before, _told(model))


# -- tensors ------------------------------------------------------------------------------------------------


def _set(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.double().clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


TENSORS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nan": (_set(NAN), "NaN or infinity"),
    "infinity": (_set(-INF), "NaN or infinity"),
    "beyond fp32": (_set(1e300), r"values up to 1\.0e\+300; float32"),
    "complex": (lambda t: t.to(torch.complex64), "type complex64"),
    "whole": (lambda t: (t * 10).to(torch.int64), "type int64"),
    "bool": (lambda t: t > 0, "type bool"),
}


def _rewrite(file: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(file)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, file)


def _rehash(folder: Path) -> None:
    manifest = json.loads((folder / "adapter.json").read_text())
    file = folder / manifest["tensors"]["file"]
    manifest["tensors"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("change", "why"), TENSORS.values(), ids=TENSORS)
def test_own_folders(change: Callable[[Tensor], Tensor], why: str, tmp_path: Path) -> None:
    folder = perturb(mmpeft.attach(Toy(), LORA)).save(tmp_path)
    name = "blocks.0.q.lora_q.factor.B"
    _rewrite(next(folder.glob("*.safetensors")), name, change)
    _rehash(folder)
    _refused(lambda model: mmpeft.load(model, folder, name="c"), f"{name} holds.*{why}")


@pytest.mark.parametrize(("change", "why"), TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya", "loha"])
def test_files_of_others(format: str, change: Callable[[Tensor], Tensor], why: str, tmp_path: Path) -> None:
    if format == "loha":
        tuning = mmpeft.attach(Toy(), mmpeft.LoHa(rank=2, at="attn.q"))
        path = perturb(tuning).export(tmp_path, "peft", verify=False).path
    else:
        path = perturb(mmpeft.attach(Toy(), LORA)).export(tmp_path, format, verify=False).path
    file = path if path.is_file() else path / "adapter_model.safetensors"
    name = next(key for key, tensor in load_file(file).items() if tensor.numel() > 1)
    _rewrite(file, name, change)
    _refused(lambda model: mmpeft.load_foreign(model, path, name="c"), f"{name} holds.*{why}")


@pytest.mark.parametrize(("value", "why"), [(NAN, "alpha holds NaN"), (INF, "alpha holds NaN"), (1e300, "alpha holds")])
def test_alpha_of_a_kohya_file(value: float, why: str, tmp_path: Path) -> None:
    path = perturb(mmpeft.attach(Toy(), LORA)).export(tmp_path, "kohya", verify=False).path
    name = next(key for key in load_file(path) if key.endswith(".alpha"))
    _rewrite(path, name, lambda t: torch.tensor(value, dtype=torch.float64))
    _refused(lambda model: mmpeft.load_foreign(model, path), why)


def test_a_whole_number_is_an_alpha_as_good_as_any(tmp_path: Path) -> None:
    path = perturb(mmpeft.attach(Toy(), LORA)).export(tmp_path, "kohya", verify=False).path
    models = [Toy(), Toy()]
    mmpeft.load_foreign(models[0], path)
    for name in [key for key in load_file(path) if key.endswith(".alpha")]:
        _rewrite(path, name, lambda t: t.round().to(torch.int64))
    mmpeft.load_foreign(models[1], path)
    x = torch.randn(2, 3, 8)
    assert torch.equal(models[0](x), models[1](x))


def test_factors_whose_product_is_infinite(tmp_path: Path) -> None:
    tuning = perturb(mmpeft.attach(Toy(), mmpeft.LoHa(rank=2, at="attn.q")))
    path = tuning.export(tmp_path, "peft", verify=False).path
    file = path / "adapter_model.safetensors"
    for name in load_file(file):
        _rewrite(file, name, lambda t: t * 0 + 1e30)
    _refused(lambda model: mmpeft.load_foreign(model, path, name="c"), "holds values|NaN or infinity")
    with pytest.raises(AdapterFileError):
        convert(path, tmp_path / "other.safetensors", "diffusers")


def test_layers_given_in_python(tmp_path: Path) -> None:
    from mmpeft.formats.bridge import attach_layers

    half = torch.zeros(2, 8), torch.zeros(8, 2)
    for layer in (
        Layer("blocks.0.q", half[0] + INF, half[1]),
        Layer("blocks.0.q", *half, alpha=NAN),
        Layer("blocks.0.q", *half, magnitude=torch.full((8,), NAN)),
    ):
        _refused(lambda model, layer=layer: attach_layers(model, [layer], "c"), "blocks.0.q")


def test_banks_and_their_heads(tmp_path: Path) -> None:
    bank = mmpeft.Bank(Toy())
    bank.add_task("one", LORA, head=mmpeft.bank.LinearHead(3, range(2)))
    bank["one"].learned["key"] = nn.Parameter(torch.ones(1, 3))
    folder = bank.save(tmp_path / "bank")
    fresh = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("entry.head.linear.weight", "entry.learned.key", "tuning.blocks.0.q.lora_q.factor.A"):
        for change, _ in (*(TENSORS[key] for key in ("nan", "complex")),):
            for file, data in fresh.items():
                (folder / file).write_bytes(data)
            manifest = json.loads((folder / "bank.json").read_text())
            file = folder / manifest["entries"][0]["file"]
            _rewrite(file, name, change)
            manifest["entries"][0]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
            (folder / "bank.json").write_text(json.dumps(manifest))
            _refused(lambda model: mmpeft.Bank.load(model, folder), name.rpartition(".")[2])


def test_what_fits_what() -> None:
    assert not unfit(torch.tensor([1e300], dtype=torch.float64), torch.float64)
    assert unfit(torch.tensor([7e4]), torch.float16)
    assert not unfit(torch.tensor([7e4]), torch.bfloat16)
    assert not unfit(torch.ones(2).to(torch.float8_e4m3fn))
    assert unfit(torch.tensor([300]), torch.uint8)
    assert unfit(torch.ones(1), torch.int64)


# -- numbers in JSON and in Python --------------------------------------------------------------------------

MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "alpha infinite": lambda m: m["method"].update(alpha=INF),
    "alpha nan": lambda m: m["method"].update(alpha=NAN),
    "alpha beyond fp32": lambda m: m["method"].update(alpha=1e300),
    "alpha of a pattern": lambda m: m["method"].update(alpha_pattern={"attn.q": INF}),
    "rank minus zero": lambda m: m["method"].update(rank=-0.0),
    "rank zero": lambda m: m["method"].update(rank=0),
    "rank a fraction": lambda m: m["method"].update(rank=2.5),
    "rank text": lambda m: m["method"].update(rank="2"),
    "rank a list": lambda m: m["method"].update(rank=[2]),
    "rank null": lambda m: m["method"].update(rank=None),
    "rank true": lambda m: m["method"].update(rank=True),
    "ranks of a pattern": lambda m: m["method"].update(rank_pattern={"attn.q": 1.5}),
    "ranks a list": lambda m: m["method"].update(rank_pattern=[1]),
    "a switch": lambda m: m["method"].update(rslora="yes"),
    "dropout nan": lambda m: m["method"].update(dropout=NAN),
    "selector a number": lambda m: m["method"].update(at=3),
    "selector of nothing": lambda m: m["method"].update(at="cross.q"),
    "method a list": lambda m: m.update(method=[]),
    "method null": lambda m: m.update(method=None),
    "method without a name": lambda m: m["method"].pop("name"),
    "a union of text": lambda m: m.update(method={"name": "Union", "methods": "abc"}),
    "a union of numbers": lambda m: m.update(method={"name": "Union", "methods": [1]}),
    "an option of few": lambda m: m.update(method={"name": "KronAB", "residual": "all"}),
    "no list": lambda m: m.update(method={"name": "LoKr", "left": "ab"}),
    "sketch no base64": lambda m: m["base"].update(sketch="%%%", fingerprint="0" * 16),
    "sketch of half a number": lambda m: m["base"].update(sketch=base64.b64encode(b"abc").decode()),
    "sketch of a number": lambda m: m["base"].update(sketch=7),
    "layout a list": lambda m: m["base"].update(layout=[]),
    "fingerprint a number": lambda m: m["base"].update(fingerprint=12),
    "fingerprint of another": lambda m: m["base"].update(fingerprint="0" * 16, layout="1" * 16),
    "no class": lambda m: m["base"].pop("class"),
    "base a list": lambda m: m.update(base=[]),
    "hash a number": lambda m: m["tensors"].update(sha256=1),
    "file a list": lambda m: m["tensors"].update(file=["a"]),
    "version text": lambda m: m.update(version="1"),
    "libraries a list": lambda m: m.update(libraries=[1], method=None),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    folder = perturb(mmpeft.attach(Toy(), LORA)).save(tmp_path)
    manifest = json.loads((folder / "adapter.json").read_text())
    change(manifest)
    (folder / "adapter.json").write_text(json.dumps(manifest))
    _refused(lambda model: mmpeft.load(model, folder, name="c"), r"adapter|base")


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 10_000, "[]", "3", "", "\ufeff{}", '{"format": "mmpeft"}'])
def test_manifests_that_are_none(text: str, tmp_path: Path) -> None:
    folder = mmpeft.attach(Toy(), LORA).save(tmp_path)
    (folder / "adapter.json").write_text(text)
    _refused(lambda model: mmpeft.load(model, folder, name="c"), r"adapter\.json")


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha infinite": {"lora_alpha": INF},
    "alpha nan": {"lora_alpha": NAN},
    "alpha beyond": {"lora_alpha": 1e300},
    "alpha text": {"lora_alpha": "8"},
    "rank zero": {"r": 0},
    "rank minus zero": {"r": -0.0},
    "alphas of a pattern": {"alpha_pattern": {".*": "8"}},
    "ranks a list": {"rank_pattern": [1]},
    "dropout text": {"lora_dropout": "a"},
    "modules a number": {"modules_to_save": 3},
    "a pattern that is none": {"rank_pattern": {"(": 2}},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_configs_of_peft(changes: dict[str, Any], tmp_path: Path) -> None:
    path = perturb(mmpeft.attach(Toy(), LORA)).export(tmp_path, "peft", verify=False).path
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    _refused(lambda model: mmpeft.load_foreign(model, path, name="c"), "")
    with pytest.raises(AdapterFileError):
        read(path)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (mmpeft.LoRA, {"alpha": INF}),
        (mmpeft.LoRA, {"alpha": NAN}),
        (mmpeft.LoRA, {"alpha": 1e39}),
        (mmpeft.LoRA, {"rank": 1.5}),
        (mmpeft.LoRA, {"rank": True}),
        (mmpeft.LoRA, {"rank": -0.0}),
        (mmpeft.LoRA, {"rank_pattern": {"attn.q": NAN}}),
        (mmpeft.LoRA, {"at": 3}),
        (mmpeft.DoRA, {"alpha_pattern": {"attn.q": INF}}),
        (mmpeft.AdaLoRA, {"dropout": INF}),
        (mmpeft.VPT, {"tokens": INF}),
        (mmpeft.VPT, {"deep": 1}),
        (mmpeft.LTSFT, {"lr": INF}),
        (mmpeft.Pfeiffer, {"bottleneck": "8"}),
        (mmpeft.KronAB, {"residual": "all"}),
        (mmpeft.KronA, {"left": [1, 2.5]}),
    ],
    ids=str,
)
def test_options_of_methods(cls: type, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"{cls.__name__}: {name}"):
        cls(**options)
