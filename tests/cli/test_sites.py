"""`mmpeft sites`: tables, a method's place, the picture, and what bad input gets."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import mmpeft
from mmpeft.cli import main
from mmpeft.run.written import read_method
from mmpeft.sites import sites
from mmpeft.sites.named import find_named

TINY = "embedded:vit_emoji"
"""Small, and its configuration is here."""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A configuration of transformers and nothing else."""
    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=64, n_positions=32)
    config.architectures = ["GPT2LMHeadModel"]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    return tmp_path


def shown(capsys, *arguments: str, code: int = 0) -> str:
    assert main(["sites", *arguments]) == code
    return capsys.readouterr().out


def data(capsys, *arguments: str, code: int = 0) -> dict:
    return json.loads(shown(capsys, *arguments, "--json", code=code))


def test_a_timm_model_as_a_table(capsys):
    text = shown(capsys, "vit_tiny_patch16_224")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "blocks 0-11 (12 alike) blocks.*" in lines
    assert "attn.k attn.qkv 192×192 192:384" in lines
    assert "mlp.down mlp.fc2 192×768" in lines
    assert "head head 1000×192" in lines
    assert any(line.startswith("pos_embed 1×197×192") for line in lines)
    assert sum(line.startswith("attn.q ") for line in lines) == 1
    assert "5,717,416 parameters, watched in " in text
    assert any(line.startswith("image 12 ") for line in lines)


def test_a_folder_with_a_configuration_of_transformers(capsys, folder):
    text = shown(capsys, str(folder))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "blocks 0-2 (3 alike) transformer.h.*" in lines
    assert "attn.v attn.c_attn 32×32 64:96" in lines  # stored [in, out], three in one


def test_json_holds_every_site(capsys, folder):
    found = data(capsys, str(folder))
    model = find_named(str(folder)).build()[0]
    expected = [site for site in sites(model) if site.role != "param"]
    assert [(s["path"], s["role"], s["depth"]) for s in found["sites"]] == [(s.path, s.role, s.depth) for s in expected]
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(found["tensors"]) == len([site for site in sites(model) if site.role == "param"])


def test_blocks_that_are_not_alike_are_apart(capsys):
    text = shown(capsys, "timm:resnet26")
    assert "layer*.0" in text
    assert "64…512" in text


def test_a_selector_narrows_the_table_and_the_method(capsys, folder):
    found = data(capsys, str(folder), "--at", "mlp.* & depth=1", "--method", "LoRA(rank=2)")
    assert {(s["role"], s["depth"]) for s in found["sites"]} == {("mlp.up", 1), ("mlp.down", 1)}
    assert {part["role"] for part in found["method"]["parts"]} == {"mlp.up", "mlp.down"}
    assert found["method"]["trainable"] == 2 * 2 * (32 + 128)


@pytest.mark.parametrize(
    "method",
    [
        "LoRA(rank=4, at='attn.*')",
        "DoRA",
        "BitFit",
        "IA3()",
        "Houlsby",
        "PTuningV2",
        "LastBlocks",
        "LoRA(rank=2) + LinearProbe()",
        "LoRA().where('depth>=2')",
        "Compacter()",
    ],
)
def test_a_method_trains_what_attach_trains(capsys, folder, method):
    found = data(capsys, str(folder), "--method", method)["method"]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    report = mmpeft.attach(model, read_method(method)).report()
    assert found["trainable"] == report.trainable
    assert found["share"] == pytest.approx(report.share)
    by_role: dict[str, int] = {}
    for part in found["parts"]:
        by_role[part["role"]] = by_role.get(part["role"], 0) + part["parameters"]
    assert by_role == {row.role: row.parameters for row in report.rows}


def test_a_method_in_the_table(capsys):
    text = shown(capsys, TINY, "--method", "LoRA(rank=3)")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(line.startswith("LoRA(rank=3) would train ") for line in lines)
    assert any(line.startswith("image attn.q blocks.*.attn.qkv ") for line in lines)


def test_a_method_from_a_file(capsys, tmp_path):
    (tmp_path / "method.yaml").write_text("method: {class_path: LoRA, init_args: {rank: 3, at: mlp.up}}")
    assert read_method(str(tmp_path / "method.yaml")) == mmpeft.LoRA(rank=3, at="mlp.up")
    assert read_method("LoRA('mlp.up', rank=3)") == mmpeft.LoRA(rank=3, at="mlp.up")


def test_a_refused_method_says_why(capsys):
    text = shown(capsys, "timm:resnet26", "--method", "LoRA(at='attn.q')", code=1)
    assert "LoRA(at='attn.q') is refused: LoRA needs sites at='attn.q', and this model has none: " in text
    assert "chooses by data what it trains" in shown(capsys, TINY, "--method", "FishMask", code=1)


def test_refused_sites_have_their_reason(capsys):
    text = shown(capsys, "embedded:clip_emoji")
    assert "[1] the causal mask and the pooled position are fixed before the blocks" in text


def size(file: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("model", [TINY, "embedded:clip_emoji", "embedded:unet_emoji", "timm:resnet26"])
def test_a_picture_is_drawn(capsys, tmp_path, model):
    shown(capsys, model, "--picture", str(tmp_path / "plain.png"))
    shown(capsys, model, "--picture", str(tmp_path / "marked.png"), "--method", "BitFit")
    wide, high = size(tmp_path / "plain.png")
    assert wide > 600
    assert high > 400
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "marked.png").read_bytes()


def test_texts_of_a_picture_do_not_overlap(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from mmpeft.bench.anatomy.fit import fit
    from mmpeft.bench.anatomy.overview import overview
    from mmpeft.bench.anatomy.picture import figure_of

    for name in ("t5", "UNet2DConditionModel", "timm:resnet50", "ViT-B-32"):
        model, _ = find_named(name).build()
        found = sites(model)
        figure = figure_of(overview(name, model, found, 0.0, found), fit(model, mmpeft.BitFit(), found))
        renderer = FigureCanvasAgg(figure).get_renderer()
        boxes = [t.get_window_extent(renderer) for t in figure.axes[0].texts if t.get_text()]
        pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        assert len(boxes) > 20
        assert not pairs
        frame = figure.bbox
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


class Own(nn.Module):
    """A module of nobody's library."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in "ab"
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean(1))


def own() -> tuple[nn.Module, torch.Tensor]:
    return Own(), torch.zeros(2, 4, 8)


def test_a_call_of_the_users_own(capsys):
    found = data(capsys, f"{__name__}:own", "--method", "LoRA(rank=1, at='mlp.*')")
    roles = [s["role"] for s in found["sites"] if s["kind"] == "linear"]
    assert roles == ["mlp.up", "mlp.down", "mlp.up", "mlp.down", "head"]
    assert found["method"]["trainable"] == 4 * (8 + 16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["vit_tinny_patch16_224"], "Did you mean 'vit_tiny_patch16_224'"),
        (["embedded:vit_emojy"], "Did you mean 'embedded:vit_emoji'"),
        (["open_clip:ViT-B-33"], "Did you mean 'ViT-B-32'"),
        (["transformers:berrt"], "Did you mean 'bert'"),
        (["diffusers:UNet2DModell"], "Did you mean 'UNet2DModel'"),
        (["torchvision:resnet5"], "torchvision has no model 'resnet5'"),
        (["convnext_base"], "write open_clip:convnext_base or timm:convnext_base"),
        ([TINY, "--method", "LoRAA"], "Did you mean 'LoRA'"),
        ([TINY, "--method", "LoRA(rnk=3)"], "Did you mean 'rank'"),
        ([TINY, "--method", "LoRA("], "cannot read the method 'LoRA('"),
        ([TINY, "--method", "missing.yaml"], "missing.yaml is neither a file nor a shipped"),
        ([TINY, "--method", "LoRA(rank=open('x'))"], "unknown method 'open'"),
        ([TINY, "--at", "attn.qq"], "Did you mean 'attn.q'"),
        ([f"{__name__}:nothing"], "expected module:function"),
        ([f"{__name__}:size"], "missing a required argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_names_the_remedy(capsys, arguments, words):
    assert main(["sites", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_nothing_is_watched_where_the_method_is_wrong(capsys):
    assert main(["sites", "no_such_model", "--method", "Nope"]) == 2
    assert "no_such_model" not in capsys.readouterr().err
