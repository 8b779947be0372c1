"""Tiny random models of the real classes, and what the tests do with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mmpeft
from tests.matrix.example import enliven

WORDS, PAD, EOS = 60, 0, 2
ALL = "attn.* | mlp.*"


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model in eval mode whose norms and biases have values of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().eval()
        enliven(model)
    return model


def causal(kind: str = "llama", seed: int = 0, **options: Any) -> Any:
    """A causal language model of transformers with two layers and 60 words."""
    import transformers as hf

    lm = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": WORDS,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "max_position_embeddings": 64,
    }
    special = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD}
    if kind == "gpt2":
        lm = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, "n_positions": 64, **special}
    elif kind in ("llama", "qwen2", "gemma2", "mistral", "phi3"):
        lm |= {"num_key_value_heads": 2, "head_dim": 8}
    classes = {"llama": "Llama", "gpt2": "GPT2", "qwen2": "Qwen2", "gemma2": "Gemma2", "mistral": "Mistral"}
    classes |= {"phi": "Phi", "phi3": "Phi3", "neox": "GPTNeoX"}
    name = classes[kind]
    cls = getattr(hf, "GPT2LMHeadModel" if kind == "gpt2" else f"{name}ForCausalLM")
    return seeded(lambda: cls(getattr(hf, f"{name}Config")(**{**lm, **options})), seed)


def t5(**options: Any) -> Any:
    import transformers as hf

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": WORDS}
    return seeded(lambda: hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, **options)))


def vit(**options: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return seeded(lambda: VisionTransformer(**{**sizes, **options}))


def images(rows: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def words(rows: int = 4, tokens: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(3, WORDS, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: int = 3, tokens: int = 7) -> dict[str, Tensor]:
    """A prompt of full length and shorter ones, padded on the left as generation needs them."""
    text, mask = words(rows, tokens), torch.ones(rows, tokens, dtype=torch.long)
    for i in range(1, rows):
        text[i, : 2 * i], mask[i, : 2 * i] = PAD, 0
    return {"input_ids": text, "attention_mask": mask}


def untouched(model: Any) -> Any:
    """The reference: a copy made before anything is attached."""
    return copy.deepcopy(model)


def bend(tuning: Any, std: float = 0.2) -> Any:
    """An update that is not zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in tuning.parameters():
            noise = std * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device, parameter.dtype))
    return tuning


@torch.no_grad()
def plain(tuning: Any, reference: Any) -> Any:
    """The untouched model with the tuning's updates added to its weights: what the tuned one must equal."""
    model = copy.deepcopy(reference)
    for placement in tuning.placements:
        for hook in placement.hooks:
            weight = model.get_submodule(hook.path).get_parameter(hook.name or "weight")
            weight.copy_(placement.part.read(model.get_submodule(hook.path), hook.name or "weight", weight))
    return model


def tuned(model: Any, at: str = ALL, std: float = 0.2, **options: Any) -> tuple[Any, Any, Any]:
    """`(tuning, untouched copy, plain model that equals the tuned one)`."""
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=at, **options)), std)
    return tuning, before, plain(tuning, before)


def close(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def near(got: Tensor, expected: Tensor, share: float = 0.05) -> None:
    """Equal up to a share of the norm: what bf16 leaves of it."""
    assert got.dtype == expected.dtype
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < share, f"{error:.3f} of the norm apart"


def differ(got: Tensor, other: Tensor) -> None:
    """The adapter is in effect: what the plain backbone answers is something else."""
    assert (got - other).abs().max() > 1e-3, "the answer is the plain backbone's: the adapter has no effect"


def gradients(tuning: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in tuning.named_parameters()}
