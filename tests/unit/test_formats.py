"""Adapter files of other tools: round trips, conversions, and what every kind of bad file gets."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmpeft
from mmpeft.errors import AdapterFileError, ConfigError, Refused, UnusedTensorsWarning
from mmpeft.formats import kohya, verify
from mmpeft.formats.bridge import attach_layers
from mmpeft.formats.commands import convert_command, inspect_command
from mmpeft.formats.content import Layer
from mmpeft.formats.exchange import FORMATS, convert, export, inspect, load_foreign, read
from mmpeft.formats.low_rank import delta_weights, layers_of
from mmpeft.run.export import main as export_main
from tests.unit.toy import Toy

METHODS = {
    "LoRA": mmpeft.LoRA(at="attn.q|mlp.*", rank=4, alpha=6),
    "patterns": mmpeft.LoRA(at="attn.q|mlp.*", rank=4, alpha=6, rslora=True, rank_pattern={"mlp.up": 3}),
    "DoRA": mmpeft.DoRA(at="attn.q|mlp.up", rank=2),
}
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def tuned(method: mmpeft.Method = METHODS["LoRA"]) -> tuple[Toy, mmpeft.Tuning]:
    model = Toy()
    tuning = mmpeft.attach(model, method)
    with torch.no_grad(), torch.random.fork_rng():
        for seed, parameter in enumerate(tuning.parameters()):
            torch.manual_seed(seed)
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, tuning


def write(tuning: mmpeft.Tuning, path: Path, format: str) -> Path:
    """Export without the libraries, which the parity tests are for."""
    export(tuning, path, format, verify=False, prefix="unet")  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("format", [format for format in FORMATS if format not in ("comfy", "adapterhub")])  # by models
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_round_trip_and_the_same_bytes_again(method: mmpeft.Method, format: str, tmp_path: Path) -> None:
    model, tuning = tuned(method)
    first = write(tuning, tmp_path / "a", format)
    loaded = load_foreign(other := Toy(), first, "style")
    torch.testing.assert_close(other(X), model(X), atol=1e-6, rtol=1e-6)
    second = write(loaded, tmp_path / "b", format)
    for file in first.iterdir():
        if format != "kohya" or method is not METHODS["patterns"]:  # r/R is no power of two there
            assert file.read_bytes() == (second / file.name).read_bytes()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_neutral_form_attaches_again(method: mmpeft.Method) -> None:
    model, tuning = tuned(method)
    base = Toy()
    wanted = delta_weights(layers_of(tuning), base)
    got = delta_weights(layers_of(attach_layers(Toy(), layers_of(tuning))), base)
    tuning.merge()
    for path, delta in wanted.items():
        torch.testing.assert_close(got[path], delta)
        merged = model.get_submodule(path).weight - base.get_submodule(path).weight
        torch.testing.assert_close(delta, merged, atol=1e-6, rtol=1e-5)


UNFIT = [
    (mmpeft.AdapterPlus(), "Branch at .* exists in no exchange format"),
    (mmpeft.SSF(), "Rescale at .* exists in no exchange format"),
    (mmpeft.IA3(at="attn.q") + mmpeft.LoRA(at="mlp.up"), "both low-rank updates and"),
    (mmpeft.DoRA(at="attn.q") + mmpeft.LoRA(at="mlp.up"), "LoRA and DoRA layers"),
]


@pytest.mark.parametrize(("method", "message"), UNFIT)
def test_what_no_file_can_hold_is_refused(method: mmpeft.Method, message: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=message):
        export(tuned(method)[1], tmp_path / "out", "peft")
    assert not list(tmp_path.iterdir())


def test_merged_unknown_format_wrong_name(tmp_path: Path) -> None:
    _, tuning = tuned()
    with pytest.raises(ConfigError, match="Did you mean 'kohya'"):
        export(tuning, tmp_path, "koya")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown prefix 'unt'"):
        export(tuning, tmp_path, "kohya", prefix="unt")
    with pytest.raises(AdapterFileError, match="folder of two files"):
        export(tuning, tmp_path / "a.safetensors", "peft", verify=False)
    tuning.merge()
    with pytest.raises(ConfigError, match="unmerge"):
        export(tuning, tmp_path)


def test_a_reader_that_disagrees_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tuning = tuned()
    real = kohya.kohya_bytes
    monkeypatch.setattr(kohya, "kohya_bytes", lambda layers, *rest: real(layers[1:], *rest))
    (tmp_path / "a.safetensors").write_text("former")
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(AdapterFileError, match="mmpeft does not find 1 of the tensors"):
            export(tuning, tmp_path / name, "kohya", prefix="unet")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.safetensors", "former")]
    with pytest.raises(AdapterFileError, match=r"difference of 2\.0e-05"):
        verify.compare("reader", {"a": torch.ones(1)}, {"a": torch.ones(1) + 2e-5})


# -- bad folders of PEFT ------------------------------------------------------------------------------------

Tensors, Config = dict[str, Tensor], dict[str, Any]
A, B = "base_model.model.blocks.0.q.lora_A.weight", "base_model.model.blocks.0.q.lora_B.weight"
HEAD = "base_model.model.head.bias"


def _rename(tensors: Tensors, old: str, new: str) -> None:
    for key in [key for key in tensors if old in key]:
        tensors[key.replace(old, new)] = tensors.pop(key)


BAD: dict[str, tuple[Callable[[Tensors, Config], Any], str]] = {
    "type": (lambda t, c: c.update(peft_type="OFT"), "peft_type 'OFT' is not read; supported: LORA, IA3"),
    "LoHa": (lambda t, c: c.update(peft_type="LOHA", modules_to_save=[]), "holds no layer of a LOHA adapter"),
    "no alpha": (lambda t, c: c.pop("lora_alpha"), "no lora_alpha, so the scale"),
    "alpha 0": (lambda t, c: c.update(lora_alpha=0), "alpha 0"),
    "rank": (lambda t, c: c.update(r=7), "rank 7 for .* its tensors have rank 4"),
    "missing half": (lambda t, c: t.pop(B), "has down but no up projection"),
    "missing layer": (lambda t, c: (t.pop(A), t.pop(B)), "1 modules that its config names have no tensors"),
    "lost layer": (lambda t, c: t.update({"x.hada_w1_a": torch.ones(1)}), "unknown key 'x.hada_w1_a' of an update"),
    "other base": (lambda t, c: t.update({f"{A[:-13]}base_layer.weight": torch.ones(9)}), r"q.weight has shape \(9,\)"),
    "shape": (lambda t, c: t.update({A: torch.ones(4, 9)}), r"a weight \[8, 9\], the model's has \[8, 8\]"),
    "halves": (lambda t, c: t.update({A: torch.ones(3, 8)}), "of the same rank r"),
    "zero layers": (lambda t, c: _rename(t, "blocks", "layers"), "none of the layers matches: 6 of 6"),
    "one elsewhere": (lambda t, c: (_rename(t, "0.q", "0.qq"), c.update(target_modules="")), "1 of 6 .*Did you mean"),
    "nan": (lambda t, c: t[A].fill_(float("nan")), "holds NaN or infinity"),
    "mixed": (lambda t, c: c.update(peft_type="IA3"), "belong to different adapters"),
    "dora": (lambda t, c: c.update(use_dora=True), "use_dora=True, but 0 of 6 layers"),
    "half an embedding": (lambda t, c: t.update({"m.lora_embedding_A": torch.ones(1, 1)}), "no up projection"),
    "pissa": (lambda t, c: c.update(init_lora_weights="pissa"), "subtracts the initial update from the base"),
    "option": (lambda t, c: c.update(use_qalora=True), r"pooled inputs \(QA-LoRA\)"),
    "half a head": (lambda t, c: t.pop(HEAD), "'bias' is not in the file"),
    "head": (lambda t, c: t.update({HEAD: torch.ones(7)}), r"head.bias has shape \(7,\), .*as many outputs"),
    "lost head": (lambda t, c: c.update(modules_to_save=["head", "norm"]), "2 modules that its config names"),
    "no layer": (lambda t, c: [t.pop(key) for key in list(t) if "lora" in key], "holds no layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_peft_folder(name: str, tmp_path: Path) -> None:
    change, message = BAD[name]
    write(tuned(METHODS["LoRA"] + mmpeft.LinearProbe())[1], tmp_path, "peft")
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, options = load_file(weights), json.loads(config.read_text())
    change(tensors, options)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, weights)
    config.write_text(json.dumps(options))
    with pytest.raises(AdapterFileError, match=message):
        load_foreign(model := Toy(), tmp_path)
    assert not mmpeft.tunings(model)
    assert all(p.requires_grad for p in model.parameters())


def test_strangers_beside_the_layers(tmp_path: Path) -> None:
    """Named in a warning; refused on request."""
    _, tuning = tuned()
    write(tuning, tmp_path, "peft")
    file = tmp_path / "adapter_model.safetensors"
    strangers = {f"bundle_emb.{n}": torch.ones(1) for n in range(5)}
    save_file({**load_file(file), **strangers}, file)
    with pytest.warns(UnusedTensorsWarning, match=r"5 tensors are no part .*'bundle_emb.0', .* and 2 more"):
        again = load_foreign(Toy(), tmp_path)
    wanted, got = delta_weights(layers_of(tuning)), delta_weights(layers_of(again))
    assert all(torch.equal(got[path], delta) for path, delta in wanted.items())
    with pytest.raises(AdapterFileError, match=r"are left: .*; strict=False loads the rest"):
        mmpeft.load_foreign(model := Toy(), tmp_path, strict=True)
    assert not mmpeft.tunings(model)


def test_pickles_parts_and_other_things(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "boom"),))

    folder = write(tuned()[1], tmp_path / "peft", "peft")
    (folder / "adapter_model.safetensors").rename(tmp_path / "b.safetensors")
    (tmp_path / "bins").mkdir()
    for name in ("peft/adapter_model.bin", "lora.pt", "bins/a.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    file = write(tuned()[1], tmp_path / "a.safetensors", "kohya")
    file.write_bytes(file.read_bytes()[:-5])
    for name, message in {
        "peft": "adapter_model.bin is pickled, and reading it would run code",
        "lora.pt": "pickled file; reading it would run code",
        "bins": "pickled files are never read",
        "a.safetensors": "only a part of one",
        "b.safetensors": "tensors of a PEFT folder",
        "nowhere": "does not exist",
    }.items():
        with pytest.raises(AdapterFileError, match=message):
            load_foreign(Toy(), tmp_path / name)
    assert not (tmp_path / "boom").exists()


# -- files of the diffusion tools ---------------------------------------------------------------------------


def _kohya(alphas: tuple[float | None, ...] = (8.0, 2.0), prefix: str = "lora_unet_") -> Tensors:
    tensors: Tensors = {}
    for alpha, name, i in zip(alphas, ("blocks_0_q", "blocks_1_down"), (8, 16)):
        tensors |= {f"{prefix}{name}.lora_{k}.weight": torch.randn(s) for k, s in (("down", (4, i)), ("up", (8, 4)))}
        tensors |= {} if alpha is None else {f"{prefix}{name}.alpha": torch.tensor(alpha)}
    return tensors


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_", "lycoris_"])
def test_kohya_alpha_of_each_layer(prefix: str, tmp_path: Path) -> None:
    file, tensors = tmp_path / "a.safetensors", _kohya((8.0, -2.0), prefix)
    save_file(tensors, file)
    deltas = delta_weights(layers_of(load_foreign(model := Toy(), file)))
    for path, scale in (("blocks.0.q", 2.0), ("blocks.1.down", -0.5)):
        down, up = (tensors[f"{prefix}{path.replace('.', '_')}.lora_{half}.weight"] for half in ("down", "up"))
        torch.testing.assert_close(deltas[path], scale * up @ down)
    info = inspect(file, model)
    assert (info.format, info.ranks, info.scales, info.unmatched) == ("kohya", {4: 2}, {-0.5: 1, 2.0: 1}, ())


def test_names_of_older_files_and_no_alpha(tmp_path: Path) -> None:
    names = (f"unet.a.processor.to_{use}_lora.{half}.weight" for use in ("q", "out") for half in ("down", "up"))
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "a.safetensors")
    content = read(tmp_path)
    assert [(layer.path, layer.scale) for layer in content.layers] == [("a.to_out.0", 1.0), ("a.to_q", 1.0)]
    assert "no alpha" in content.notes[0]


def test_layers_with_and_without_magnitude_in_one_file(tmp_path: Path) -> None:
    model, tuning = tuned(mmpeft.DoRA(at="attn.q", rank=2) + mmpeft.LoRA(at="mlp.up", rank=2))
    loaded = load_foreign(other := Toy(), write(tuning, tmp_path / "k.safetensors", "kohya"))
    torch.testing.assert_close(other(X), model(X), atol=1e-6, rtol=1e-6)
    assert inspect(tmp_path / "k.safetensors").method == "DoRA+LoRA"
    assert loaded.method == mmpeft.LoRA(at="mlp.up", rank=2, alpha=2.0) + mmpeft.DoRA(at="attn.q", rank=2, alpha=2.0)


BAD_FILES: dict[str, tuple[Tensors, str]] = {
    "alpha 0": (_kohya((8.0, 0.0)), "has alpha 0"),
    "two styles": (_kohya() | {"unet.head.lora_A.weight": torch.ones(1, 8)}, "mixes two formats"),
    "LoHa": (_kohya() | {"lora_unet_head.hada_w1_a": torch.ones(3, 1)}, "has hada_w1_a but no hada_w1_b"),
    "LoKr": ({"lycoris_head.lokr_w1": torch.ones(1, 1), "lycoris_head.alpha": torch.tensor(1.0)}, "no lokr_w2_a"),
    "Tucker": (_kohya() | {"lora_unet_head.lora_mid.weight": torch.ones(1, 1, 3, 3)}, "but no up"),
    "OFT": (_kohya() | {"lora_unet_head.oft_blocks": torch.ones(1, 4, 4)}, r"no OFT of a weight \[3, 8\]"),
    "BOFT": (_kohya() | {"lora_unet_head.boft_blocks": torch.ones(1, 3, 3)}, "BOFT ×1, a factor that is not read"),
    "foreign": ({"model.weight": torch.ones(2)}, r"unknown key 'model\.weight'"),
    "pipeline": (_kohya() | _kohya(prefix="lora_te1_"), "choose one with component="),
    "original": (
        {f"lora_unet_input_blocks_1.lora_{n}.weight": torch.ones(2, 2) for n in ("up", "down")},
        "of an original",
    ),
    "column norms": (_kohya() | {"lora_unet_blocks_1_down.dora_scale": torch.ones(1, 9)}, "DoRA by input column of a"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name: str, tmp_path: Path) -> None:
    tensors, message = BAD_FILES[name]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=message):
        load_foreign(Toy(), tmp_path / "a.safetensors")


def test_a_pipeline_by_component_and_ambiguous_names(tmp_path: Path) -> None:
    save_file(_kohya() | _kohya(prefix="lora_te1_"), tmp_path / "a.safetensors")
    assert len(load_foreign(Toy(), tmp_path / "a.safetensors", component="text_encoder").placements) == 2
    with pytest.raises(AdapterFileError, match="Did you mean 'unet'"):
        load_foreign(Toy(), tmp_path / "a.safetensors", component="unett")
    model = Toy()
    model.blocks_0 = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8)})
    with pytest.raises(AdapterFileError, match="names 2 modules"):
        load_foreign(model, tmp_path / "a.safetensors", component="unet")
    layers = [Layer(path, torch.ones(1, 2), torch.ones(2, 1)) for path in ("a.b_c", "a_b.c")]
    with pytest.raises(Refused, match="are both lora_unet_a_b_c"):
        kohya.kohya_bytes(layers, "unet")


def test_conversions_need_a_model_only_from_kohya(tmp_path: Path) -> None:
    model, tuning = tuned(METHODS["patterns"])
    write(tuning, tmp_path / "peft", "peft")
    convert(tmp_path / "peft", tmp_path / "d.safetensors", "diffusers", prefix="unet")
    convert(tmp_path / "d.safetensors", tmp_path / "k.safetensors", "kohya")
    with pytest.raises(AdapterFileError, match="give the model whose modules it names"):
        convert(tmp_path / "k.safetensors", tmp_path / "back", "peft")
    assert convert(tmp_path / "k.safetensors", tmp_path / "back", "peft", model=Toy()).verified_by == ("mmpeft",)
    load_foreign(other := Toy(), tmp_path / "back")
    torch.testing.assert_close(other(X), model(X), atol=1e-6, rtol=1e-6)


def test_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tuning = tuned(METHODS["patterns"])
    tuning.save(tmp_path / "own")
    assert load_foreign(Toy(), tmp_path / "own").method == METHODS["patterns"]
    model = ["--model", "tests.unit.toy:Toy"]
    own, file, folder = str(tmp_path / "own"), str(tmp_path / "k.safetensors"), str(tmp_path / "hf")
    assert export_main(["export", own, file, "--to", "kohya", "--prefix", "unet", *model]) == 0
    assert convert_command(["convert", file, folder, "--to", "peft", *model]) == 0
    assert "6 layers" in capsys.readouterr().out
    assert inspect_command(["inspect", own, file, folder, *model]) == 0
    assert "6 of 6 layers" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="a Python call"):
        inspect_command(["inspect", file, "--model", "nonsense"])
