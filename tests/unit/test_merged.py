"""Merged models as their own library reads them: the answers of the tuned model, and nothing of this suite."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

import mmpeft
from mmpeft.cli import main as merge_command
from mmpeft.errors import AdapterFileError, ConfigError, Refused
from mmpeft.formats import merged
from mmpeft.formats.merged import save_merged
from tests.matrix.families import FAMILIES
from tests.matrix.families import timm as timm_families
from tests.matrix.families.diffusers import FAMILIES as DIFFUSERS
from tests.matrix.families.quantized import FAMILIES as QUANTIZED
from tests.matrix.families.transformers import GQA
from tests.support.moved import attach_moved
from tests.unit.toy import Toy

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
WORDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))


def llama(tied: bool = False, **options: object) -> hf.LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**GQA, tie_word_embeddings=tied, **options)).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(WORDS).logits


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in QUANTIZED])
def test_every_family_is_read_back(family: str, tmp_path: Path) -> None:
    example = FAMILIES[family]()
    tuning = attach_moved(example.model, mmpeft.LoRA(at="mlp.up" if family == "convnext" else "attn.{q,v}", rank=2))
    before = {key: tensor.clone() for key, tensor in example.model.state_dict().items()}
    answer = example.answer()
    written = tuning.save_merged(tmp_path / "out")
    assert all(torch.equal(tensor, before[key]) for key, tensor in example.model.state_dict().items())
    assert torch.equal(example.answer(), answer)
    plain = merged.merged_copy(tuning)
    assert type(plain) is merged.original_class(example.model)
    assert (written.library, written.tensors) == (merged.library_of(plain), len(plain.state_dict()))
    close = {"atol": 1e-4, "rtol": 1e-4} if family == "resnet" else CLOSE  # sums of thousands of terms
    torch.testing.assert_close(example.answer(plain), answer, **close)
    files = [file.name for file in (tmp_path / "out").iterdir()]
    assert [name.name for name in tmp_path.iterdir()] == ["out"]
    assert not any(
        "mmpeft" in key for name in files if name.endswith(".safetensors") for key in load_file(tmp_path / "out" / name)
    )


def test_timm_creates_it(tmp_path: Path) -> None:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **size)
    tuning = attach_moved(model, mmpeft.LoRA(at="attn.*|mlp.*|embed") + mmpeft.BitFit(at="norm") + mmpeft.LinearProbe())
    written = tuning.save_merged(tmp_path / "vit.safetensors")
    assert (written.path.name, written.library) == ("vit.safetensors", "timm")
    overlay = {"file": str(written.path), "num_classes": 5}
    x = torch.randn(2, 3, 32, 32)
    for read in ({"checkpoint_path": str(written.path)}, {"pretrained": True, "pretrained_cfg_overlay": overlay}):
        plain = timm.create_model("vit_tiny_patch16_224", **size, **read).eval()
        torch.testing.assert_close(plain(x), model(x), **CLOSE)


def test_open_clip_creates_it(tmp_path: Path) -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2},
    }
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    model = open_clip.create_model("tiny-clip")
    written = attach_moved(model, mmpeft.LoRA(at="*attn.*|*mlp.*")).save_merged(tmp_path / "clip.safetensors")
    plain = open_clip.create_model("tiny-clip", pretrained=str(written.path)).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain.encode_image(x), model.encode_image(x), **CLOSE)
    torch.testing.assert_close(
        plain.encode_text(WORDS.new_ones(2, 8)), model.encode_text(WORDS.new_ones(2, 8)), **CLOSE
    )


def test_llama_keeps_its_class_and_its_tie(tmp_path: Path) -> None:
    model = llama(tied=True)
    tuning = attach_moved(model, mmpeft.LoRA(at="attn.*|mlp.*"))
    assert tuning.save_merged(tmp_path / "out").untied == ()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["tie_word_embeddings"]) == (["LlamaForCausalLM"], True)
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(logits(plain), logits(model), **CLOSE)


@pytest.mark.parametrize(
    "method", [mmpeft.LinearProbe(), mmpeft.LoRA(at="embed|attn.q", rank=2)], ids=["head", "embed"]
)
def test_a_tie_that_training_has_cut(method: mmpeft.Method, tmp_path: Path) -> None:
    model = llama(tied=True)
    written = attach_moved(model, method).save_merged(tmp_path / "out")
    assert len(written.untied) == 1
    assert model.config.tie_word_embeddings
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(plain), logits(model), **CLOSE)


def test_the_shell_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Toy()
    attach_moved(model, mmpeft.LoRA(at="mlp.*")).save(tmp_path / "own")
    file = tmp_path / "toy.safetensors"
    assert merge_command(["merge", str(tmp_path / "own"), str(file), "--model", "tests.unit.toy:Toy"]) == 0
    assert "torch read back 16 tensors" in capsys.readouterr().out
    plain = Toy()
    plain.load_state_dict(load_file(file))
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(plain(x), model(x), **CLOSE)


def test_half_precision_stays(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    attach_moved(model, mmpeft.LoRA()).save_merged(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_unet_of_diffusers(tmp_path: Path) -> None:
    example = DIFFUSERS["sd_unet"]()
    attach_moved(example.model, mmpeft.LoRA(at="attn.*|cross.*|conv", rank=2)).save_merged(tmp_path / "unet")
    plain = merged.original_class(example.model).from_pretrained(tmp_path / "unet").eval()  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    torch.testing.assert_close(example.answer(plain), example.answer(), **CLOSE)


# -- what is refused ----------------------------------------------------------------------------------------


def test_biases_without_a_place_and_parts_that_do_not_merge(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"creates 14 tensors that LlamaForCausalLM has no place for, .*create=False"):
        attach_moved(llama(), mmpeft.BitFit()).save_merged(tmp_path / "out")
    with pytest.raises(Refused, match="cannot be merged"):
        attach_moved(llama(), mmpeft.Houlsby()).save_merged(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_ties_that_no_config_can_cut(tmp_path: Path) -> None:
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=60)
    )
    tuning = attach_moved(model, mmpeft.LoRA(at="attn.q", rank=2))
    state = tuning._state
    with pytest.MonkeyPatch.context() as patch:
        plain = merged.merged_copy(tuning)
        plain.encoder.embed_tokens.weight = nn.Parameter(plain.encoder.embed_tokens.weight + 1)
        patch.setattr(merged, "merged_copy", lambda _: plain)
        with pytest.raises(Refused, match="are one tensor in T5ForConditionalGeneration and differ"):
            save_merged(tuning, tmp_path / "out")
    assert not state.merged


def test_places_that_are_taken_and_merged_already(tmp_path: Path) -> None:
    tuning = attach_moved(llama(), mmpeft.LoRA())
    with pytest.raises(AdapterFileError, match="the name of one file"):
        tuning.save_merged(tmp_path / "a.safetensors")
    tuning.save_merged(tmp_path / "out")
    with pytest.raises(AdapterFileError, match="is not empty"):
        tuning.save_merged(tmp_path / "out")
    vit = attach_moved(timm_families.FAMILIES["vit"]().model, mmpeft.LoRA())
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(AdapterFileError, match="is a folder"):
        vit.save_merged(tmp_path / "b.safetensors")
    vit.merge()
    with pytest.raises(ConfigError, match="unmerge"):
        vit.save_merged(tmp_path / "c.safetensors")


@pytest.mark.parametrize(("family", "name"), [("vit", "m.safetensors"), ("llama", "m")])
def test_a_reader_that_disagrees_leaves_nothing(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = attach_moved(FAMILIES[family]().model, mmpeft.LoRA())
    read = merged._read

    def wrong(library: str, load: object) -> object:
        result = read(library, load)  # type: ignore[arg-type]
        if isinstance(result, nn.Module):
            next(result.parameters()).data.add_(1)
        return result

    monkeypatch.setattr(merged, "_read", wrong)
    monkeypatch.setitem(merged.LOADERS, "timm", lambda model, file: None)
    (tmp_path / "m.safetensors").write_text("former")
    with pytest.raises(AdapterFileError, match="reads another value of"):
        tuning.save_merged(tmp_path / name)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("m.safetensors", "former")]


def test_words_templates_and_preprocessing_lie_beside_the_model_again(tmp_path: Path) -> None:
    """transformers' own save leaves them to others; code is left where it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    base = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(base)
    beside = ["additional_chat_templates/rag.jinja", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in (*beside, "modeling.py"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    written = mmpeft.attach(LlamaForCausalLM.from_pretrained(base), mmpeft.LoRA()).save_merged(tmp_path / "merged")
    assert sorted(written.kept) == beside
    assert all((written.path / name).read_text() == name for name in beside)
    assert not (written.path / "modeling.py").exists()
