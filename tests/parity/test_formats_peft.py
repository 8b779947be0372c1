"""Files against the programs that read and write them: HF PEFT and diffusers give our outputs, and we theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import MMPEFTError, Refused, SiteError
from mmpeft.formats.exchange import convert, export, load_foreign
from mmpeft.formats.low_rank import delta_weights, layers_of
from mmpeft.sites import sites
from tests.support.moved import add_noise

peft = pytest.importorskip("peft")

Family = tuple[nn.Module, Callable[[nn.Module], Tensor]]
TOLERANCE: dict[str, float] = {"atol": 1e-5, "rtol": 1e-5}


def vit(**known: Any) -> Family:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, **known)
    x = torch.randn(2, 3, 32, 32)
    return model, lambda m: m(x)


def llama() -> Family:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    x = torch.randint(0, 50, (2, 7))
    return LlamaForCausalLM(config), lambda m: m(input_ids=x).logits


def classifier() -> Family:
    """PEFT names two heads for it, and only one exists."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_labels=3, pad_token_id=0)
    x = torch.randint(1, 50, (2, 7))
    return LlamaForSequenceClassification(config), lambda m: m(input_ids=x).logits


def gpt2() -> Family:
    """Weights stored [in, out], and one projection for queries, keys and values."""
    from transformers import GPT2Config, GPT2LMHeadModel

    x = torch.randint(0, 50, (2, 7))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16))
    return model, lambda m: m(input_ids=x).logits


def neox() -> Family:
    """Queries, keys and values of every head side by side in one projection."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    x = torch.randint(0, 50, (2, 7))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4)), lambda m: m(input_ids=x).logits


def unet() -> Family:
    pytest.importorskip("mmpeft.diffusion")
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    x, t, text = torch.randn(2, 3, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 8)
    return model, lambda m: m(x, t, text).sample


FAMILIES = {"vit": vit, "llama": llama, "classifier": classifier, "gpt2": gpt2, "neox": neox, "unet": unet}


def build(family: str) -> Family:
    """A model in evaluation mode with biases of its own; skips where its domain has no anatomy."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, run = FAMILIES[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    try:
        sites(model)
    except SiteError as error:
        pytest.skip(str(error))
    return model.eval(), torch.no_grad()(run)


def theirs(family: str, config: Any, folder: Path) -> Tensor:
    """Train nothing, randomise, save: the outputs of an adapter that PEFT wrote into a folder."""
    model, run = build(family)
    wrapped = peft.get_peft_model(model, config).eval()
    add_noise(p for p in wrapped.parameters() if p.requires_grad)
    wrapped.save_pretrained(str(folder))
    return run(wrapped)


OURS: list[tuple[str, mmpeft.Method]] = [
    ("vit", mmpeft.LoRA(rank=4, alpha=6)),
    (
        "vit",
        mmpeft.LoRA(at="attn.*|mlp.*", rank=4, rslora=True, rank_pattern={"mlp.*": 2}, alpha_pattern={"mlp.up": 3}),
    ),
    ("vit", mmpeft.LoRA(at="embed|attn.q", rank=2) + mmpeft.LinearProbe()),
    ("vit", mmpeft.DoRA(at="attn.{q,v}|mlp.*|embed", rank=3) + mmpeft.NormTuning()),
    ("vit", mmpeft.IA3()),
    ("llama", mmpeft.LoRA(at="attn.*|mlp.*", rank=4, alpha=6)),
    ("llama", mmpeft.LoRA(at="embed|attn.q", rank=2, alpha=6)),
    ("llama", mmpeft.DoRA(rank=2)),
    ("llama", mmpeft.IA3()),
    ("gpt2", mmpeft.LoRA(at="attn.*|mlp.*", rank=4, alpha=6)),
    ("gpt2", mmpeft.DoRA(rank=2)),
    ("gpt2", mmpeft.IA3()),
    ("neox", mmpeft.LoRA(rank=4, alpha=6)),
    ("neox", mmpeft.DoRA(rank=2)),
    ("unet", mmpeft.LoRA(at="attn.*|cross.*|conv", rank=4, alpha=6, rank_pattern={"conv": 2})),
    ("unet", mmpeft.DoRA(at="attn.{q,v}|conv", rank=2)),
]


@pytest.mark.parametrize(
    ("family", "method"), OURS, ids=lambda value: value if isinstance(value, str) else type(value).__name__
)
def test_ours_in_peft_and_back(family: str, method: mmpeft.Method, tmp_path: Path) -> None:
    model, run = build(family)
    plain = run(model)
    tuning = mmpeft.attach(model, method)
    add_noise(tuning.parameters())
    y = run(model)
    assert (y - plain).abs().max() > 1e-3
    written = export(tuning, tmp_path / "hf")
    assert [reader.split()[0] for reader in written.verified_by] == ["mmpeft", "peft"]
    assert written.difference < 1e-6

    base, _ = build(family)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "hf"))
    torch.testing.assert_close(run(loaded), y, **TOLERANCE)

    again = load_foreign(base, tmp_path / "hf")
    torch.testing.assert_close(run(base), y, **TOLERANCE)
    export(again, tmp_path / "again", verify=False)
    for file in (tmp_path / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_export_leaves_the_tuned_model_alone(tmp_path: Path) -> None:
    model, run = build("vit")
    tuning = mmpeft.attach(model, mmpeft.LoRA())
    add_noise(tuning.parameters())
    y, before = run(model), {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    export(tuning, tmp_path / "hf")
    assert torch.equal(run(model), y)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])


LYCORIS: list[tuple[str, mmpeft.Method]] = [
    ("vit", mmpeft.LoHa(at="mlp.*|embed", rank=2, alpha=3)),
    ("vit", mmpeft.LoHa(at="attn.out", rank=8, rank_pattern={"depth>=1": 3})),
    ("vit", mmpeft.LoKr(at="mlp.*|embed", rank=2, alpha=3)),
    ("unet", mmpeft.LoHa(at="attn.*|conv", rank=2, alpha=3)),
    ("unet", mmpeft.LoKr(at="attn.*|conv", rank=1, alpha=3)),
    ("unet", mmpeft.LoKr(at="cross.*|conv", rank=64)),
    ("unet", mmpeft.KronA(at="attn.*", scale=2.0)),
]


@pytest.mark.parametrize(
    ("family", "method"), LYCORIS, ids=lambda value: value if isinstance(value, str) else type(value).__name__
)
def test_factors_of_lycoris_in_every_format(family: str, method: mmpeft.Method, tmp_path: Path) -> None:
    """PEFT and kohya files hold the factors themselves; diffusers gets the LoRA that they equal."""
    model, run = build(family)
    plain = run(model)
    tuning = mmpeft.attach(model, method)
    add_noise(tuning.parameters())
    y = run(model)
    assert (y - plain).abs().max() > 1e-3
    own = sum(parameter.numel() for parameter in tuning.parameters())
    readers = {"peft": ["mmpeft", "peft"], "kohya": ["mmpeft"], "diffusers": ["mmpeft", "diffusers"]}
    for format in ("peft", "kohya", "diffusers") if family == "unet" else ("peft", "kohya"):
        written = export(tuning, tmp_path / format, format)
        assert [reader.split()[0] for reader in written.verified_by] == readers[format]
        assert bool(written.notes) == (format != "peft")
        if format != "diffusers":
            assert written.bytes < 4 * own + 40_000
        other, _ = build(family)
        load_foreign(other, written.path)
        torch.testing.assert_close(run(other), y, **TOLERANCE)
    other, _ = build(family)
    torch.testing.assert_close(run(peft.PeftModel.from_pretrained(other, str(tmp_path / "peft"))), y, **TOLERANCE)


def test_factors_of_a_slice_of_a_weight(tmp_path: Path) -> None:
    """A fused projection has no LoHa of its rows in any file: written is the LoRA it equals."""
    for method in (mmpeft.LoHa(at="attn.{q,v}", rank=3), mmpeft.LoHa(at="attn.q", rank=8), mmpeft.LoKr(at="attn.q")):
        model, run = build("vit")
        tuning = mmpeft.attach(model, method)
        add_noise(tuning.parameters())
        y = run(model)
        export(tuning, tmp_path)
        other, _ = build("vit")
        torch.testing.assert_close(run(peft.PeftModel.from_pretrained(other, str(tmp_path))), y, **TOLERANCE)


LORA = partial(peft.LoraConfig, r=4, lora_alpha=6, lora_dropout=0.1)
THEIRS: dict[str, tuple[str, Any]] = {
    "fused": ("vit", LORA(target_modules=["qkv", "fc1"])),
    "patterns": (
        "vit",
        LORA(
            target_modules=r".*(proj|fc\d)",
            rank_pattern={"fc1": 2},
            alpha_pattern={r"blocks\.0\..*fc2": 9},
            use_rslora=True,
        ),
    ),
    "conv, head": ("vit", LORA(target_modules=["proj"], modules_to_save=["head"])),
    "DoRA": ("vit", LORA(target_modules=["qkv", "fc2"], use_dora=True)),
    "conv DoRA": ("vit", LORA(target_modules=["patch_embed.proj"], use_dora=True)),
    "fused IA3": ("vit", peft.IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"])),
    "llama": ("llama", LORA(target_modules=["q_proj", "down_proj"], layers_to_transform=[1])),
    "two heads": ("classifier", LORA(task_type="SEQ_CLS")),
    "embedding": ("llama", LORA(target_modules=["embed_tokens", "q_proj"])),
    "embedding DoRA": ("llama", LORA(target_modules=["embed_tokens", "v_proj"], use_dora=True)),
    "llama IA3": ("llama", peft.IA3Config(task_type="CAUSAL_LM")),
    "gpt2": ("gpt2", LORA(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "gpt2 DoRA": ("gpt2", LORA(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)),
    "gpt2 IA3": ("gpt2", peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True)),
    "neox": ("neox", LORA(target_modules=["query_key_value"])),
    "unet": ("unet", LORA(target_modules=["to_q", "to_out.0", "conv1", "conv_in", "conv_shortcut"])),
    "LoHa": ("vit", peft.LoHaConfig(r=2, alpha=3, target_modules=["fc1", "patch_embed.proj"])),
    "LoHa patterns": (
        "unet",
        peft.LoHaConfig(
            r=2, alpha=3, target_modules=["to_q", "conv1"], rank_pattern={"to_q": 3}, alpha_pattern={"conv1": 1}
        ),
    ),
    "LoHa Tucker": ("unet", peft.LoHaConfig(r=2, alpha=3, target_modules=["conv1"], use_effective_conv2d=True)),
    "LoKr": ("vit", peft.LoKrConfig(r=2, alpha=3, target_modules=["fc1", "fc2"], decompose_both=True)),
    "LoKr whole": ("vit", peft.LoKrConfig(r=32, alpha=48, target_modules=["fc1", "patch_embed.proj"])),
    "LoKr conv": ("unet", peft.LoKrConfig(r=1, alpha=3, target_modules=["to_q", "conv1"])),
    "LoKr Tucker": ("unet", peft.LoKrConfig(r=1, alpha=3, target_modules=["conv1"], use_effective_conv2d=True)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_in_ours_and_back(name: str, tmp_path: Path) -> None:
    family, config = THEIRS[name]
    y = theirs(family, config, tmp_path / "hf")
    model, run = build(family)
    plain = run(model)
    tuning = load_foreign(model, tmp_path / "hf")
    torch.testing.assert_close(run(model), y, **TOLERANCE)
    assert (y - plain).abs().max() > 1e-3
    dropped = {p.part.dropout for p in tuning.placements if hasattr(p.part, "factor") and not p.part.lookup}
    assert "IA3" in name or config.peft_type in ("LOHA", "LOKR") or dropped == {0.1}
    export(tuning, tmp_path / "again")
    base, _ = build(family)
    torch.testing.assert_close(run(peft.PeftModel.from_pretrained(base, str(tmp_path / "again"))), y, **TOLERANCE)


def test_what_peft_never_runs_is_refused(tmp_path: Path) -> None:
    """BEiT reads the weight of `qkv`, so that PEFT's layer there is never called."""
    from timm.models.beit import Beit

    model = Beit(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, use_rel_pos_bias=True)
    tuning = mmpeft.attach(model, mmpeft.LoRA())
    for format in ("peft", "diffusers"):
        with pytest.raises(Refused, match="would have no effect"):
            export(tuning, tmp_path / "x", format)
    assert export(tuning, tmp_path / "x", "kohya").layers == 1


def test_other_methods_of_peft_are_named(tmp_path: Path) -> None:
    theirs("vit", peft.OFTConfig(target_modules=["fc1"]), tmp_path)
    with pytest.raises(MMPEFTError, match=r"peft_type 'OFT' is not read; supported: LORA, IA3"):
        load_foreign(build("vit")[0], tmp_path)


# -- diffusers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [method for family, method in OURS if family == "unet"], ids=lambda m: type(m).__name__
)
def test_ours_in_diffusers_in_both_styles(method: mmpeft.Method, tmp_path: Path) -> None:
    model, run = build("unet")
    tuning = mmpeft.attach(model, method)
    add_noise(tuning.parameters())
    y = run(model)
    for format in ("diffusers", "kohya"):
        written = export(tuning, tmp_path / format, format)
        dropped = format == "kohya" and isinstance(method, mmpeft.DoRA)
        readers = [reader.split()[0] for reader in written.verified_by]
        assert readers == (["mmpeft"] if dropped else ["mmpeft", "diffusers"])
        assert bool(written.notes) == dropped
        other, _ = build("unet")
        load_foreign(other, tmp_path / format)
        torch.testing.assert_close(run(other), y, **TOLERANCE)
    other, _ = build("unet")
    other.load_lora_adapter(str(tmp_path / "diffusers"), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(run(other), y, **TOLERANCE)


def test_what_diffusers_saves(tmp_path: Path) -> None:
    """Alpha is in the metadata alone; the layers are those of the whole pipeline file."""
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin as Loader
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers

    model, run = build("unet")
    model.add_adapter(LORA(target_modules=["to_q", "conv1"], rank_pattern={"conv1": 2}, lora_dropout=0.0))
    add_noise(p for n, p in model.named_parameters() if "lora_" in n)
    y = run(model)
    state = convert_state_dict_to_diffusers(peft.utils.get_peft_model_state_dict(model))
    metadata = model.peft_config["default"].to_dict()
    Loader.save_lora_weights(str(tmp_path), unet_lora_layers=state, unet_lora_adapter_metadata=metadata)
    other, _ = build("unet")
    tuning = load_foreign(other, tmp_path)
    torch.testing.assert_close(run(other), y, **TOLERANCE)
    convert(tmp_path, tmp_path / "k.safetensors", "kohya")
    last, _ = build("unet")
    wanted, got = (delta_weights(layers_of(t)) for t in (tuning, load_foreign(last, tmp_path / "k.safetensors")))
    assert wanted.keys() == got.keys()
    for path, delta in wanted.items():
        torch.testing.assert_close(got[path], delta)
