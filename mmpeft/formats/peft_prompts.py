"""PEFT folders of learned embeddings (PROMPT_TUNING, P_TUNING) and of learned keys and values (PREFIX_TUNING).

They hold one tensor, `prompt_embeddings`: what an encoder made is saved, never the encoder. PEFT moves the text
behind the prefix and gives the prefix no position; here the text keeps its positions. Where positions are rotations,
keys are rotated from one convention to the other; elsewhere no keys could stand for the others, and it is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, Refused
from mmpeft.formats.content import Learned
from mmpeft.methods.additive.prefix_tuning import PrefixTuning
from mmpeft.methods.additive.prompt_tuning import PromptTuning, PTuning
from mmpeft.methods.base import Method
from mmpeft.parts.base import Placement
from mmpeft.parts.prefix import Prefix
from mmpeft.parts.prompt import Prompt, PromptBeside, PromptLayer
from mmpeft.sites import Site, sites
from mmpeft.surgery.choice import use
from mmpeft.surgery.state import state_of
from mmpeft.types import AnyModule, Facts, Json

PROMPT, P_TUNING, PREFIX = TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
KEY, WRAPPED = "prompt_embeddings", "base_model."
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForMaskedLM": "FEATURE_EXTRACTION",
    "Model": "FEATURE_EXTRACTION",
}
"""How a class's name ends, and the task whose wrapper in PEFT puts the prompt in front; without one it never does."""
WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks whose wrappers save heads whole."""


def is_learned(placement: Placement) -> bool:
    """Whether a placement is a prompt, a prefix, or a part of one."""
    return isinstance(placement.part, Prompt | PromptBeside | PromptLayer | Prefix)


def read(config: Facts, tensors: Mapping[str, Tensor], where: Path) -> Learned:
    """The learned tensor of a folder.

    Raises:
        AdapterFileError: no tensor, or of another length than the config says.
    """
    kind, count = str(config["peft_type"]), config.get("num_virtual_tokens")
    tensor = tensors.get(KEY)
    if tensor is None or tensor.dim() != 2:
        raise AdapterFileError(f"{where} has no matrix {KEY!r}, which is all that a {kind} adapter is")
    modules = config.get("num_transformer_submodules") or 1
    rows = count if kind == PREFIX else (count or 0) * modules
    if not isinstance(count, int) or len(tensor) != rows:
        raise AdapterFileError(
            f"{where}: {len(tensor)} rows, the config says {count} tokens × {modules}; the files belong to different "
            "adapters"
        )
    # A sequence-to-sequence file has rows for the decoder too, which PEFT never reads.
    return Learned(kind, tensor[:count], dict(config))


def fields(learned: Learned) -> Json:
    """The config of a folder."""
    known = ("num_layers", "num_attention_heads", "token_dim", "task_type")
    own = {name: learned.config.get(name) for name in known}
    own |= {"peft_type": learned.kind, "num_virtual_tokens": len(learned.tensor), "num_transformer_submodules": 1}
    if learned.kind == PROMPT:
        return own | {"prompt_tuning_init": "RANDOM"}
    own["encoder_hidden_size"] = own["token_dim"]
    return own | (
        {"prefix_projection": False} if learned.kind == PREFIX else {"encoder_reparameterization_type": "MLP"}
    )


# -- out ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def learned_of(model: nn.Module, placements: Sequence[Placement], whole: Collection[str] = ()) -> Learned:
    """The prompt or the prefixes of a tuning as PEFT has them; `whole` are the modules saved beside them.

    Raises:
        Refused: PEFT would compute something else from them.
    """
    name = type(model).__name__
    task = next((task for end, task in TASKS.items() if name.endswith(end)), None)
    if task is None:
        raise Refused(f"PEFT puts prompts before models of {', '.join(TASKS)}; {name} is none of them")
    if whole and task not in WITH_HEADS:
        raise Refused(f"beside a prompt PEFT saves heads of classifiers only; {name} trains {sorted(whole)} too")
    available = sites(model)
    attentions = [site for site in available if site.role == "kv"]
    config = {"task_type": task, "num_layers": len(attentions), "num_attention_heads": attentions[0].heads}
    prompts = [p for p in placements if isinstance(p.part, Prompt)]
    prefixes = {p.home: p.part for p in placements if isinstance(p.part, Prefix)}
    if len(prompts) + bool(prefixes) != 1:
        raise Refused("a PEFT folder holds one prompt, or one prefix for every layer; this tuning has more")
    if prompts:
        part: AnyModule = prompts[0].part
        _check_pooling(model, next(s for s in available if s.kind == "embedding" and s.connect is not None))
        kind = P_TUNING if prompts[0].key.startswith("ptuning") else PROMPT
        tensor = part.embeddings().detach().clone()
        return Learned(kind, tensor, config | {"token_dim": tensor.shape[1]})
    _check_alike(model, attentions)
    if set(prefixes) != {site.path for site in attentions}:
        raise Refused(f"PEFT has a prefix in each of {len(attentions)} attentions; this tuning in {len(prefixes)}")
    found: list[Tensor] = []
    for site in attentions:
        keys, values = prefixes[site.path].keys_and_values()
        found += [_shifted(model, site, keys, len(keys)), values]
    tensor = torch.stack(found, dim=1).flatten(1)
    return Learned(PREFIX, tensor, config | {"token_dim": attentions[0].heads * attentions[0].width})


# -- in -----------------------------------------------------------------------------------------------------


def method_for(model: nn.Module, learned: Learned, where: object) -> tuple[Method, dict[str, Tensor]]:
    """The method that holds a file's prompt or prefixes, and its tensors by the path of their part.

    Raises:
        AdapterFileError: it is for another model, or this one would compute something else from it.
    """
    count, available = len(learned.tensor), sites(model)
    try:
        if learned.kind == PREFIX:
            attentions = [site for site in available if site.role == "kv"]
            _check_alike(model, attentions)
            return PrefixTuning(tokens=count, hidden=0), _prefixes(model, attentions, learned, where)
        method = (
            PromptTuning(tokens=count, init="uniform") if learned.kind == PROMPT else PTuning(tokens=count, hidden=0)
        )
        site = method.only(available)
        _check_pooling(model, site)
    except Refused as error:
        raise AdapterFileError(f"{where} cannot act in {type(model).__name__} as it does in PEFT: {error}") from error
    if learned.tensor.shape[1] != site.width:
        raise AdapterFileError(
            f"{where} has embeddings of {learned.tensor.shape[1]} values, the model's have {site.width}; the adapter "
            "was made for another base"
        )
    return method, {"": learned.tensor}


def _prefixes(model: nn.Module, attentions: Sequence[Site], learned: Learned, where: object) -> dict[str, Tensor]:
    count, own = learned.tensor.shape
    heads, width = (attentions[0].heads, attentions[0].width) if attentions else (0, 0)
    if own != 2 * len(attentions) * heads * width:
        raise AdapterFileError(
            f"{where} has {own} values a token, the model takes {2 * len(attentions) * heads * width} (keys and values "
            f"of {len(attentions)} layers, {heads} heads of {width}); the adapter was made for another base"
        )
    layers = learned.tensor.view(count, len(attentions), 2, heads, width).permute(1, 2, 0, 3, 4)
    return {
        site.path: torch.stack([_shifted(model, site, keys, -count), values])
        for site, (keys, values) in zip(attentions, layers)
    }


@torch.no_grad()
def fill(placements: Sequence[Placement], tensors: Mapping[str, Tensor]) -> None:
    """Set the tensors of `method_for` in an attached tuning."""
    for placement in placements:
        if isinstance(placement.part, Prompt | Prefix):
            assert placement.part.tokens is not None
            placement.part.tokens.copy_(tensors[placement.home])


# -- what must hold -----------------------------------------------------------------------------------------


def _paired(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _check_alike(model: nn.Module, attentions: Sequence[Site]) -> None:
    if _paired(model):
        raise Refused(
            "PEFT's prefix of an encoder-decoder acts in the decoder's self-attention alone, under biases by distance; "
            "here a prefix acts in every attention and has no position"
        )
    refused = next((site for site in attentions if site.refuse), None)
    if refused is not None:
        raise Refused(f"{refused}: {refused.refuse}")
    if len({(site.heads, site.width) for site in attentions}) != 1:
        raise Refused("its attentions have heads of several sizes (or it has none); PEFT knows one size")


def _shifted(model: nn.Module, site: Site, keys: Tensor, by: int) -> Tensor:
    if site.connect is None or site.connect.shift is None:
        raise Refused(f"{site}: the anatomy does not say how positions enter its keys")
    moved: Tensor = site.connect.shift(model, site, keys, by)
    return moved


@torch.no_grad()
def _check_pooling(model: nn.Module, site: Site) -> None:
    """Raise Refused for an encoder whose answer is not one for each word.

    PEFT's first position is the prompt's, and it is what it pools; here the text's own first word stays first.
    """
    assert site.connect is not None
    if site.connect.layers or _paired(model):
        return
    like = next(model.parameters())

    def shapes(words: int) -> dict[str, torch.Size]:
        answer = model(input_ids=torch.ones(1, words, dtype=torch.long, device=like.device))
        return {name: value.shape for name, value in answer.items() if isinstance(value, Tensor)}

    with use(model, None) if state_of(model) else nullcontext():
        short, long = shapes(3), shapes(4)
    pooled = [name for name, shape in short.items() if shape == long[name]]
    if pooled:
        raise Refused(
            f"{type(model).__name__} answers with {pooled[0]} for the whole text, pooled from its first position: in "
            "PEFT that is a prompt embedding, here the text's own first word"
        )
