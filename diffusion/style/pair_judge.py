"""The evaluator of one's own images: an image-text pair of transformers, such as CLIP or SigLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from mmpeft.diffusion.style.judge import Judge, eight_bits
from mmpeft.errors import ConfigError
from mmpeft.types import Output, Untyped

AT_ONCE = 32


class PairFeatures(nn.Module):
    """Image features of a pair, of uint8 images [B, 3, H, W]."""

    def __init__(self, model: Untyped, processor: Untyped) -> None:
        super().__init__()
        self.model, self.processor = model, processor

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, e] in the joint space."""
        parts = (self.processor(images=list(part), return_tensors="pt") for part in images.split(AT_ONCE))
        return torch.cat([pooled(self.model.get_image_features(pixel_values=part["pixel_values"])) for part in parts])


class PairJudge(Judge):
    """Whether an image is nearer to its own prompt than to the others, and how near it is.

    `caption` is the share of images whose own prompt is the likeliest of all prompts of the set, and `similarity` the
    mean cosine between an image and its prompt (CLIP score, arXiv:2104.08718, not scaled).
    """

    def __init__(self, name: str) -> None:
        """
        Args:
            name: a repository or folder of transformers with an image-text pair, such as
                `openai/clip-vit-base-patch32`.

        Raises:
            ConfigError: it cannot be loaded, or is no image-text pair.
        """
        try:
            self.model: Untyped = AutoModel.from_pretrained(name, use_safetensors=True).eval().requires_grad_(False)
            self.tokenizer: Untyped = AutoTokenizer.from_pretrained(name)
            processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"cannot load the evaluator {name}: {reason}; name a repository or a folder") from error
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise ConfigError(f"the evaluator {name} is a {type(self.model).__name__}; expected an image-text pair")
        self.features = PairFeatures(self.model, processor)

    @torch.no_grad()
    def accuracy(self, images: Tensor, prompts: Sequence[str], labels: Tensor | None = None) -> dict[str, float]:
        """`caption` and `similarity`; equal prompts are one."""
        texts = list(dict.fromkeys(prompts))
        own = torch.tensor([texts.index(prompt) for prompt in prompts])
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        said = F.normalize(pooled(self.model.get_text_features(**tokens)), dim=-1)
        cosines = F.normalize(self.features(eight_bits(images)), dim=-1) @ said.mT
        return {
            "caption": float((cosines.argmax(1) == own).float().mean()),
            "similarity": float(cosines.gather(1, own[:, None]).mean()),
        }


def pooled(found: Output) -> Tensor:
    """The features in what transformers returns, which has changed between its versions."""
    features: Tensor = found.pooler_output if hasattr(found, "pooler_output") else found
    return features
