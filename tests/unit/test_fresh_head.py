"""A head that nobody trained and that stays frozen gets a warning with the cure; all else is silent."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import mmpeft
from mmpeft.errors import FreshHeadWarning
from tests.unit.toy import Toy

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def _vit(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=classes, **TINY)


def _trained(model: nn.Module) -> nn.Module:
    """A few steps on the head alone, as whoever trained it did."""
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.3)
    size = (8, 3, model.head.in_features) if isinstance(model, Toy) else (8, 3, 32, 32)
    for _ in range(5):
        optimizer.zero_grad()
        y = model(torch.randn(size))
        nn.functional.cross_entropy(y, torch.arange(8) % y.shape[1]).backward()
        optimizer.step()
    return model


def _silent(model: nn.Module, method: mmpeft.methods.Method, **options: bool) -> mmpeft.Tuning:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FreshHeadWarning)
        return mmpeft.attach(model, method, **options)


def test_the_first_example_of_the_readme_is_warned_of_and_cured() -> None:
    with pytest.warns(FreshHeadWarning, match=r"head 'head' of VisionTransformer.*train_head=True.*LinearProbe"):
        tuning = mmpeft.attach(_vit(), mmpeft.LoRA(rank=2) + mmpeft.BitFit())
    assert not any("linearprobe" in name for name, _ in tuning.named_parameters())
    tuning = _silent(_vit(), mmpeft.LoRA(rank=2), train_head=True)
    assert {n for n, _ in tuning.named_parameters() if n.startswith("head")} == {
        "head.linearprobe_weight.value",
        "head.linearprobe_bias.value",
    }
    assert tuning.method == mmpeft.LoRA(rank=2) + mmpeft.LinearProbe()


@pytest.mark.parametrize(
    "method",
    [mmpeft.Full(), mmpeft.LinearProbe(), mmpeft.LoRA(rank=2) + mmpeft.LinearProbe(), mmpeft.LoRA(at="head|attn.q")],
    ids=str,
)
def test_methods_that_train_the_head_are_silent(method: mmpeft.methods.Method) -> None:
    _silent(_vit(), method)
    _silent(_vit(), mmpeft.Full(), train_head=True)


def test_a_method_kept_from_the_head_is_warned_of() -> None:
    with pytest.warns(FreshHeadWarning):
        mmpeft.attach(_vit(), mmpeft.Full().where("depth>=0"))


def test_a_trained_head_and_none_at_all_are_silent() -> None:
    _silent(_trained(_vit()), mmpeft.LoRA(rank=2))
    _silent(_vit(0), mmpeft.LoRA(rank=2))


def test_a_layer_as_pytorch_makes_it_is_fresh_until_it_is_trained() -> None:
    with pytest.warns(FreshHeadWarning, match="as PyTorch makes a layer"):
        mmpeft.attach(Toy(width=128), mmpeft.LoRA(rank=2, at="attn.q"))
    _silent(_trained(Toy(width=128)), mmpeft.LoRA(rank=2, at="attn.q"))
    _silent(Toy(width=8), mmpeft.LoRA(rank=2, at="attn.q"))  # too few entries to tell


def _zero(model: nn.Module) -> nn.Module:
    nn.init.zeros_(model.head.weight)
    return model


def _bare(model: nn.Module) -> nn.Module:
    model.head.bias = None
    return model


def test_a_head_of_zeros_is_fresh_and_a_bare_one_is_no_class_head() -> None:
    with pytest.warns(FreshHeadWarning, match="weight of 'head' is all zero"):
        mmpeft.attach(_zero(_bare(_vit())), mmpeft.LoRA(rank=2))
    _silent(_bare(_vit()), mmpeft.LoRA(rank=2))


def test_a_second_tuning_of_a_model_is_judged_alike() -> None:
    model = _vit()
    _silent(model, mmpeft.LoRA(rank=2), train_head=True)
    with pytest.warns(FreshHeadWarning):
        mmpeft.attach(model, mmpeft.LoRA(rank=2), name="other")


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(vocab_size=40, **sizes))


def _llama(tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **sizes))


@pytest.mark.parametrize("make", [_bert, lambda: _llama(True), lambda: _llama(False)], ids=["bert", "tied", "untied"])
def test_heads_of_language_models_are_no_class_heads(make: Callable[[], nn.Module]) -> None:
    _silent(make(), mmpeft.LoRA(rank=2))


def test_a_classifier_of_transformers_is_warned_of() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=7, **sizes))
    with pytest.warns(FreshHeadWarning, match="classifier"):
        mmpeft.attach(model, mmpeft.LoRA(rank=2))


def test_an_untrained_task_trains_its_head_without_a_word() -> None:
    from mmpeft.tasks.module import TuningModule

    class Task(TuningModule):
        def build(self) -> nn.Module:
            return _vit()

        def loss(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.model(batch).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error", FreshHeadWarning)
        Task(mmpeft.LoRA(rank=2)).prepare()
