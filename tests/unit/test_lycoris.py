"""LoHa, LoKr and Tucker layers: the low-rank layer has the ΔW that the factors multiply out to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import AdapterFileError
from mmpeft.formats.exchange import convert, inspect, load_foreign
from mmpeft.formats.low_rank import delta_weights, layers_of
from mmpeft.formats.lycoris import layer_of
from mmpeft.sites import Site, anatomy, qualified_name

OUT, IN = 12, 8
SHAPES = {"linear": (), "conv1d": (3,), "conv2d": (3, 2), "conv3d": (2, 3, 1)}


class Mixed(nn.Module):
    """A linear and a convolution of the same widths, and a 1 × 1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(IN, OUT)
        self.down_conv = nn.Conv2d(IN, OUT, (3, 2))
        self.point = nn.Conv2d(IN, OUT, 1)


@anatomy(qualified_name(Mixed))
def mixed(model: nn.Module) -> list[Site]:
    """The sites of `Mixed`."""
    paths = {"proj": "linear", "down_conv": "conv", "point": "conv"}
    return [Site(path, "mlp.up", i, kind=kind) for i, (path, kind) in enumerate(paths.items())]  # type: ignore[arg-type]


def randn(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def loha(kernel: tuple[int, ...], rank: int = 2, tucker: bool = False) -> dict[str, Tensor]:
    if tucker:
        halves = {f"hada_w{n}_{half}": (rank, size) for n in (1, 2) for half, size in (("a", OUT), ("b", IN))}
        return randn(**halves, hada_t1=(rank, rank, *kernel), hada_t2=(rank, rank, *kernel))
    flat = IN * int(torch.tensor(kernel).prod())
    return randn(**{f"hada_w{n}_{half}": s for n in (1, 2) for half, s in (("a", (OUT, rank)), ("b", (rank, flat)))})


def lokr(kernel: tuple[int, ...], one: str = "whole", two: str = "whole", rank: int = 1) -> dict[str, Tensor]:
    """w1 is [2, 4], w2 is [6, 2, *kernel]."""
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= {"lokr_w1": (2, 4)} if one == "whole" else {"lokr_w1_a": (2, rank), "lokr_w1_b": (rank, 4)}
    if two == "whole":
        shapes["lokr_w2"] = (6, 2, *kernel)
    elif two == "tucker":
        shapes |= {"lokr_t2": (rank, rank, *kernel), "lokr_w2_a": (rank, 6), "lokr_w2_b": (rank, 2)}
    else:
        shapes |= {"lokr_w2_a": (6, rank), "lokr_w2_b": (rank, 2 * int(torch.tensor(kernel).prod()))}
    return randn(**shapes)


def tucker(kernel: tuple[int, ...], rank: int = 3) -> dict[str, Tensor]:
    ones = [1] * len(kernel)
    shapes = {"down": (rank, IN, *ones), "up": (OUT, rank, *ones), "lora_mid.weight": (rank, rank, *kernel)}
    return randn(**shapes)


def multiplied_out(own: dict[str, Tensor], kernel: tuple[int, ...]) -> Tensor:
    """ΔW without its scale in float64, by the definitions."""
    t = {name: tensor.double() for name, tensor in own.items()}
    if "lora_mid.weight" in t:
        return torch.einsum("op,pq...,qi->oi...", t["up"].flatten(1), t["lora_mid.weight"], t["down"].flatten(1))
    if "hada_w1_a" in t:
        if "hada_t1" in t:
            one, two = (
                torch.einsum("pq...,qi,po->oi...", t[f"hada_t{n}"], t[f"hada_w{n}_b"], t[f"hada_w{n}_a"])
                for n in (1, 2)
            )
            return one * two
        return ((t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])).view(OUT, IN, *kernel)
    one = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        two = torch.einsum("pq...,qi,po->oi...", t["lokr_t2"], t["lokr_w2_b"], t["lokr_w2_a"])
    else:
        two = t["lokr_w2"] if "lokr_w2" in t else (t["lokr_w2_a"] @ t["lokr_w2_b"]).view(6, 2, *kernel)
    return torch.kron(one.view(2, 4, *[1] * (two.dim() - 2)), two.clone(memory_format=torch.contiguous_format))


CASES = {
    f"{name} {shape}": (make(SHAPES[shape]), SHAPES[shape], rank)
    for shape in SHAPES
    for name, make, rank in (
        ("LoHa", loha, 2),
        ("LoHa, more ranks than rows", lambda k: loha(k, 5), 5),
        ("LoHa Tucker", lambda k: loha(k or (1, 1), 2, True), 2),
        ("LoKr", lokr, None),
        ("LoKr w2 split", lambda k: lokr(k, two="split"), 1),
        ("LoKr w2 split, more ranks than columns", lambda k: lokr(k, two="split", rank=7), 7),
        ("LoKr both split", lambda k: lokr(k, "split", "split"), 1),
        ("LoKr w1 split", lambda k: lokr(k, "split"), 1),
        ("LoKr Tucker", lambda k: lokr(k or (1, 1), two="tucker"), 1),
        ("Tucker LoRA", lambda k: tucker(k or (1, 1)), 3),
    )
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_delta(name: str) -> None:
    own, kernel, rank = CASES[name]
    layer = layer_of({**own, "alpha": torch.tensor(3.0)}, "a", Path("file"))
    scale = 1.0 if rank is None else 3.0 / rank
    wanted = scale * multiplied_out(own, kernel)
    got = (layer.scale * layer.up.double() @ layer.down.double().flatten(1)).view(wanted.shape)
    assert layer.rank <= min(OUT, IN * int(torch.tensor(kernel).prod()))
    assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert layer_of(own, "a", Path("file")).scale == pytest.approx(1.0)  # LyCORIS without alpha


FILES = {
    "LoHa": (loha(()), loha((3, 2)), loha(())),
    "LoHa, full rank": (loha((), 5), loha((3, 2), 5), loha((), 5)),
    "LoHa Tucker": (loha(()), loha((3, 2), 2, True), loha(())),
    "LoKr": (lokr(()), lokr((3, 2)), lokr((1, 1))),
    "LoKr split": (lokr((), two="split"), lokr((3, 2), two="split"), lokr((), "split", "split")),
    "LoKr Tucker": (lokr(()), lokr((3, 2), two="tucker"), lokr((1, 1))),
}


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_", "unet."])
@pytest.mark.parametrize("name", FILES)
def test_a_file_into_a_model(name: str, prefix: str, tmp_path: Path) -> None:
    dotted = dict(zip(("proj", "down_conv", "point"), FILES[name]))
    tensors = {f"{prefix}{path}.{key}": t for path, own in dotted.items() for key, t in own.items()}
    tensors |= {f"{prefix}{path}.alpha": torch.tensor(0.5) for path in dotted}
    save_file(tensors, file := tmp_path / "a.safetensors")
    model = Mixed()
    before = {path: model.get_submodule(path).weight.detach().double() for path in dotted}
    tuning = load_foreign(model, file)
    tuning.merge()
    for path, own in dotted.items():
        ranks = [len(own[key]) for key in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if key in own]
        kernel = model.get_submodule(path).weight.shape[2:]
        wanted = multiplied_out(own, tuple(kernel) if own is not dotted["proj"] else ())
        wanted = wanted.view(before[path].shape) * (0.5 / ranks[0] if ranks else 1.0)
        got = model.get_submodule(path).weight.double() - before[path]
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=2e-6)
    tuning.unmerge()
    info = inspect(file, Mixed())
    assert (info.format, info.layers, info.unmatched, info.refused) == ("lycoris", 3, (), "")
    assert info.method == name.split()[0].strip(",")
    written = convert(file, tmp_path / "k.safetensors", "kohya", model=Mixed(), prefix="unet")
    back = delta_weights(layers_of(load_foreign(Mixed(), written.path)))
    for path, delta in delta_weights(layers_of(tuning)).items():
        torch.testing.assert_close(back[path], delta, atol=1e-6, rtol=1e-6)


def _without(own: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in own.items() if key != name}


BAD = {
    "w2 of LoHa": (_without(loha(()), "hada_w2_a"), "but no hada_w2_a"),
    "one core": (_without(loha((3, 2), 2, True), "hada_t2"), "one of hada_t1 and hada_t2"),
    "w2 of LoKr": (_without(lokr(()), "lokr_w2"), "but no lokr_w2_a"),
    "half of w2": (_without(lokr((), two="split"), "lokr_w2_b"), "but no lokr_w2_b"),
    "w1 of LoKr": (_without(lokr(()), "lokr_w1"), "but no lokr_w1_a"),
    "ranks": (loha(()) | {"hada_w1_b": torch.ones(3, IN)}, r"do not belong together: hada_w1_a \[12, 2\]"),
    "columns": (loha(()) | {"hada_w1_b": torch.ones(2, 9)}, "do not belong together"),
    "rows": (loha(()) | {"hada_w1_a": torch.ones(9, 2)}, "do not belong together"),
    "core": (loha((3, 2), 2, True) | {"hada_t1": torch.ones(2, 3, 3, 2)}, "do not belong together"),
    "both forms": (lokr(()) | lokr((), two="split"), "do not belong together"),
    "dimensions": (lokr(()) | {"lokr_w1": torch.ones(4)}, "do not belong together"),
    "two factors": (loha(()) | lokr(()), "tensors of LoHa and LoKr"),
    "two ranks": ({**loha(()), "hada_w2_a": torch.ones(OUT, 3), "hada_w2_b": torch.ones(3, IN)}, r"ranks \[2, 3\]"),
    "halves": (loha(()) | {"lora_down.weight": torch.ones(2, IN)}, r"is LoHa and also has \['down'\]"),
    "alpha": (loha(()) | {"alpha": torch.ones(2)}, r"alpha of shape \(2,\)"),
    "alpha 0": (loha(()) | {"alpha": torch.zeros(1)}, "has alpha 0"),
    "lengths": (loha(()) | {"dora_scale": torch.ones(9, 1)}, "expected one length for each of 12"),
    "column lengths": (loha(()) | {"dora_scale": torch.ones(1, IN + 1)}, "DoRA by input column of a"),
    "base": (loha((3, 2)), r"update of a weight \[12, 48\], the model's has \[12, 8\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_layers(name: str, tmp_path: Path) -> None:
    own, message = BAD[name]
    tensors = {f"lora_unet_proj.{key}": tensor for key, tensor in ({"alpha": torch.ones(1)} | own).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=message):
        load_foreign(model := Mixed(), tmp_path / "a.safetensors")
    assert not mmpeft.tunings(model)


def test_a_flat_kernel_needs_the_model(tmp_path: Path) -> None:
    save_file({f"unet.proj.{key}": tensor for key, tensor in loha(()).items()}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="a flat kernel"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", model=Mixed(), prefix="unet")


def test_lengths_of_rows_make_it_dora(tmp_path: Path) -> None:
    model, lengths = Mixed(), torch.rand(OUT, 1) + 0.5
    tensors = {f"lora_unet_proj.{key}": tensor for key, tensor in loha(()).items()}
    save_file(tensors | {"lora_unet_proj.dora_scale": lengths}, tmp_path / "a.safetensors")
    wanted = model.proj.weight.double() + multiplied_out(loha(()), ())
    wanted = wanted * lengths.double() / wanted.norm(dim=1, keepdim=True)
    load_foreign(model, tmp_path / "a.safetensors").merge()
    torch.testing.assert_close(model.proj.weight.double(), wanted, atol=1e-6, rtol=1e-6)
