"""Prompt tuning and P-tuning: learned embeddings before a language model's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.hosting.modules import module_at
from mmpeft.methods.base import Method, Sited, register
from mmpeft.methods.needs import Need, Refusal
from mmpeft.methods.placed import Placed, Tensors
from mmpeft.methods.recipe import any_tensor, own_weight, positive
from mmpeft.parts.attention import connection
from mmpeft.parts.base import Hook, Placement, trainable_dtype
from mmpeft.parts.prompt import Prompt, PromptBeside, PromptLayer, PromptLSTM, PromptMLP
from mmpeft.sites import Selector, Site


def _of_fixed_length(method: InputPrompt, chosen: Sequence[Site], available: Sequence[Site]) -> Site | None:
    """An embedding, if there is not exactly one that the model's anatomy can lengthen."""
    words = [site for site in chosen if site.kind == "embedding"]
    return None if sum(site.connect is not None for site in words) == 1 else [*words, *chosen][0]


@dataclass(frozen=True)
class InputPrompt(Sited):
    """`tokens` learned embeddings before the text; subclasses say what they start from or what makes them.

    A decoder keeps their keys and values. In an encoder they are part of the sequence until its last layer, and are
    taken out before pooling and heads, so that `[CLS]` stays first. In an encoder-decoder they stand before the
    encoder's text alone, and cross-attention sees them.
    """

    at: Selector = "embed"
    tokens: int = 20

    refuses: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            _of_fixed_length,
            "the anatomy knows no way to lengthen the text of this model (it does for decoders, BERT's family and T5); "
            "use PrefixTuning or PTuningV2, which learn keys and values directly",
        ),
    )

    def __post_init__(self) -> None:
        positive(self, tokens=self.tokens)

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("an embedding of words to put learned ones beside", self.at, "embedding"),)

    def start(self, model: nn.Module, site: Site) -> Tensor | None:
        """Values the embeddings [p, d] start from; None where an encoder makes them."""
        raise NotImplementedError

    def encoder(self, site: Site) -> nn.Module | None:
        """What makes the embeddings while training."""
        return None

    def only(self, available: list[Site]) -> Site:
        """The one input embedding that learned ones can stand beside."""
        return next(s for s in self.chosen(available) if s.kind == "embedding" and s.connect is not None)

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        site = self.only(available)
        like = any_tensor(model, site)
        dtype = trainable_dtype(like.dtype)
        start, encoder = self.start(model, site), self.encoder(site)
        assert site.connect is not None
        prompt = Prompt(
            None if start is None else start.to(like.device, dtype),
            None if encoder is None else encoder.to(like.device, dtype),
            site.connect.view,
            model,
        )
        key = type(self).__name__.lower()
        placements = [Placement(prompt, "", key, (Hook(site.connect.attribute, "around"),), "embed")]
        for path, run in site.connect.beside:
            placements.append(Placement(PromptBeside(prompt, run), path, key, (Hook(path, "around"),), "embed"))
        layers = [s for s in available if s.role == "kv" and s.tower == site.tower]
        for i, layer in enumerate(layers if site.connect.layers else ()):
            connect = connection(layer)
            hook = Hook(layer.path, "read", connect.attribute)
            placements.append(Placement(PromptLayer(prompt, i, connect.view), layer.path, key, (hook,), "kv"))
        return Placed(placements)

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return self.tokens * self.only(available).width


@register("https://arxiv.org/abs/2104.08691", "additive", mergeable=False, identity=False)
@dataclass(frozen=True)
class PromptTuning(InputPrompt):
    """`[P; E(x)]` with `p` learned embeddings P [p, d]. Parameters: `p d`.

    `init`: `uniform` in ±0.5, embeddings of random words (`vocabulary`), or of the words `init_ids`, repeated or
    cut to p. Wants a learning rate far above LoRA's (0.3 with Adafactor in the paper).
    """

    init: Literal["uniform", "vocabulary"] = "vocabulary"
    init_ids: Sequence[int] = ()

    def start(self, model: nn.Module, site: Site) -> Tensor:
        table = own_weight(model, site).t()  # [words, d]
        if self.init == "uniform" and not self.init_ids:
            return torch.rand(self.tokens, site.width) - 0.5
        ids = torch.tensor(self.init_ids) if self.init_ids else torch.randint(len(table), (self.tokens,))
        if int(ids.max()) >= len(table) or int(ids.min()) < 0:
            raise ConfigError(
                f"PromptTuning: init_ids go from {ids.min()} to {ids.max()}, the words to {len(table) - 1}"
            )
        ids = ids.repeat(-(-self.tokens // len(ids)))[: self.tokens]
        embed = module_at(model, site.path)
        with torch.no_grad():
            start: Tensor = embed(ids.to(table.device))
        return start.clone()


@register("https://arxiv.org/abs/2103.10385", "additive", mergeable=False, identity=False)
@dataclass(frozen=True)
class PTuning(InputPrompt):
    """`[encoder(E); E(x)]`: a two-layer BiLSTM and an MLP (`lstm`), or a three-layer MLP (`mlp`), of size `hidden`.

    `tuning.for_inference()` drops the encoder and keeps the embeddings it makes; `hidden=0` trains those directly.
    """

    reparameterisation: Literal["lstm", "mlp"] = "lstm"
    hidden: int = 128

    def start(self, model: nn.Module, site: Site) -> Tensor | None:
        return None if self.hidden else torch.randn(self.tokens, site.width)

    def encoder(self, site: Site) -> nn.Module | None:
        made = {"lstm": PromptLSTM, "mlp": PromptMLP}[self.reparameterisation]
        return made(self.tokens, site.width, self.hidden) if self.hidden else None

    def count(self, model: nn.Module, available: list[Site]) -> int:
        d, h = self.only(available).width, self.hidden
        own = self.tokens * d
        if not h:
            return own
        if self.reparameterisation == "mlp":
            return own + h * (d + 1) + h * (h + 1) + d * (h + 1)
        lstm = 2 * 4 * h * (d + h + 2) + 2 * 4 * h * (2 * h + h + 2)
        return own + lstm + 2 * h * (2 * h + 1) + d * (2 * h + 1)

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placed = super().place(model, available)
        return replace(placed, bake=partial(self._bake, placed.placements)) if self.hidden else placed

    def _bake(self, placements: Sequence[Placement]) -> tuple[Method, Tensors]:
        """The embeddings that the encoder makes, without it."""
        prompts = [p.part if isinstance(p.part, Prompt) else None for p in placements]
        return replace(self, hidden=0), [{"tokens": part.embeddings()} if part else {} for part in prompts]
