"""Where a prompt enters a transformers model, and what else must know of it."""

from __future__ import annotations

import inspect
from dataclasses import replace

from torch import nn

from mmpeft.hosting.host import original_class
from mmpeft.hosting.modules import module_at, own_modules
from mmpeft.llm.attention import consults
from mmpeft.llm.prompt import bidirectional, cross_attended, prompted, stripped, unlengthened
from mmpeft.sites import Connect, Site
from mmpeft.types import Config


def prompts(model: nn.Module, found: list[Site]) -> list[Site]:
    """The embeddings of words say how a prompt gets before the text, where a way is known."""
    where, prompt = _prompt(model, found)
    words = {s.path for s in found if s.kind == "embedding" and s.role == "embed" and f"{s.path}.".startswith(where)}
    return [replace(s, connect=prompt) if s.path in words else s for s in found]


def _prompt(model: nn.Module, found: list[Site]) -> tuple[str, Connect | None]:
    """How a prompt gets before the text, and where the text's embedding is; None where no way is known."""
    stacks = {s.tower: s.path for s in found if s.role == "stack" and s.tower != "image"}
    towers = set(stacks)
    attentions = [module_at(model, s.path) for s in found if s.role == "kv" and s.tower in towers]
    causal = [bool(getattr(attention, "is_causal", False)) for attention in attentions]
    if towers == {"lm"} and all(causal) and all(map(consults, attentions)):
        path = _model_around(model, stacks["lm"])
        layers = len(list(module_at(model, stacks["lm"]).children()))
        if layers == len(attentions) and _told_positions(module_at(model, path)):
            return f"{path}.".lstrip("."), Connect(path, prompted, layers=True)
        return "", None  # where blocks are of another kind, some have no keys to put the prompt's in front of
    around = module_at(model, _model_around(model, stacks["lm"])) if towers == {"lm"} else None
    if around is not None and getattr(getattr(around, "config", None), "is_decoder", False):
        return "", None  # a cache, in which the prompt would be again with every word
    stacks = {tower: path.rpartition(".")[0] for tower, path in stacks.items()}
    whole = {tower: _is_model(module_at(model, path)) for tower, path in stacks.items()}
    if towers == {"encoder", "decoder"} and all(whole.values()):  # T5
        path = stacks["encoder"]
        return f"{path}.", Connect(path, bidirectional, beside=((stacks["decoder"], cross_attended),))
    if towers == {"lm"} and not any(causal):
        path = stacks["lm"]
        if whole["lm"]:  # T5's encoder alone
            return f"{path}.", Connect(path, stripped)
        outer = path.rpartition(".")[0]  # BERT: embeddings and pooler are beside the encoder
        if _is_model(module_at(model, outer)):
            return f"{outer}.".lstrip("."), Connect(outer, stripped, beside=((path, unlengthened),))
    return "", None


def _is_model(module: nn.Module) -> bool:
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def _model_around(model: nn.Module, path: str) -> str:
    """The nearest model of transformers around a stack of blocks: it takes words or embeddings, and positions."""
    while path and not _is_model(module_at(model, path)):
        path = path.rpartition(".")[0]
    return path


def _told_positions(model: nn.Module) -> bool:
    """Whether all that a model knows of positions is told by `position_ids`, so that a text can be moved."""
    config: Config = getattr(model, "config", None)
    if getattr(config, "alibi", False) or getattr(config, "attention_chunk_size", None):
        return False  # by distance out of the mask; windows of which a moved text would have others
    counted = any(isinstance(m, nn.Embedding) and "attention_mask" in arguments(m) for _, m in own_modules(model))
    return not counted and "position_ids" in arguments(model)


def arguments(module: nn.Module) -> set[str]:
    """Names of what a module's forward takes."""
    return set(inspect.signature(original_class(module).forward).parameters) - {"self"}
