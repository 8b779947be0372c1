"""What watching cannot see of transformers' models: names of towers, the registry of attentions, where a prompt enters.

Registered by class name: importing this file imports no transformers. What is said here of a module is checked by
running the models in `tests/unit/test_anatomy_transformers.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from torch import nn

from mmpeft.functional.rows import count_rows
from mmpeft.hosting.modules import module_at, own_modules, own_parameters
from mmpeft.llm import inputs
from mmpeft.llm.attention import consults, view
from mmpeft.llm.prompting import arguments, prompts
from mmpeft.llm.rotary import shifted
from mmpeft.llm.scans import references, scans
from mmpeft.parts.attention import attend
from mmpeft.sites import Connect, Site, example_inputs, note, prepares, while_watching
from mmpeft.sites.builder import weight_shape
from mmpeft.sites.keys import UNEQUAL
from mmpeft.types import AnyModule, Config

TEXT = "positions and the attention mask are made before the blocks; tokens put in between would have neither"
SPARSE = "long texts are attended to block-sparse, by the number of keys; set attention_type='original_full'"
CHOSEN = "an indexer chooses its keys by their number, which learned keys would shift"
HEADS = {"lm_head", "embed_out", "score", "classifier", "qa_outputs", "cls", "classification_head"}
HEAD = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
BESIDE_WORDS = ("token_type", "position")
"""Embeddings of what is said beside the words."""
PLAIN = {"hidden_states", "attention_mask", "output_attentions", "head_mask", "causal_attention_mask", "kwargs"}
"""What an attention is given that knows nothing of how many tokens there are, or where."""

cosine = partial(attend, keyed=partial(F.normalize, dim=-1))
"""For scores that are cosines: learned keys are normalised as the module's own are (Swin V2)."""

example_inputs(inputs.example_inputs)
while_watching(references)


@prepares
def open_kernels(shadow: nn.Module) -> None:
    """Attention by products in place of flex attention, a kernel that compiles itself."""
    for _, module in own_modules(shadow):
        config: Config = module.__dict__.get("config")
        if str(getattr(config, "_attn_implementation", "")).startswith("flex"):
            config._attn_implementation = "sdpa"


@note("transformers.modeling_utils.PreTrainedModel")
def transformer(model: nn.Module, found: list[Site]) -> list[Site]:
    """Any model of transformers."""
    names = _towers(model, found)
    found = [replace(site, tower=names.get(site.tower, _tower(model, site))) for site in found]
    found = [_headed(site) for site in found if not _is_beside(site)]
    found = [_keys(model, site, found) if site.role == "kv" else site for site in found]
    return prompts(model, _tokens(model, scans(model, found)))


def _towers(model: nn.Module, found: list[Site]) -> dict[str, str]:
    """How a tower is called: of several that would be called the same, the one nearest to the root."""
    first = {site.tower: site for site in reversed(found) if site.role == "block"}
    names: dict[str, str] = {}
    place = {site.tower: i for i, site in enumerate(found) if site is first.get(site.tower)}
    for site in sorted(first.values(), key=lambda site: (site.path.count("."), place[site.tower])):
        name = _tower(model, site)
        names[site.tower] = site.tower if name in (*names.values(), "") else name
    config: Config = model.config
    if set(names) == {"text"} and not str(config.model_type).endswith("_text_model"):
        names = {"text": "lm" if names["text"] == "text" else names["text"]}
    return names


def _tower(model: nn.Module, site: Site) -> str:
    """`encoder` and `decoder` of a sequence-to-sequence model, `image` and `text` of two towers so named."""
    config: Config = model.config
    names = site.path.split(".")
    if getattr(config, "is_encoder_decoder", False):
        return next((name for name in names if name in ("encoder", "decoder")), "")
    if "vision_model" in names or "text_model" in names:
        return "image" if "vision_model" in names else "text"
    return "lm" if site.tower == "text" and "language_model" in names else site.tower


def _is_beside(site: Site) -> bool:
    return site.kind == "embedding" and site.path.rpartition(".")[2].startswith(BESIDE_WORDS)


def _headed(site: Site) -> Site:
    """What stands in a module named for a task is its head; a pooler is none."""
    names = set(site.path.split("."))
    if site.role == "head" and "pooler" in names:
        return replace(site, role="proj")
    return replace(site, role="head") if site.role == "proj" and site.depth < 0 and names & HEADS else site


def _keys(model: nn.Module, site: Site, found: list[Site]) -> Site:
    """Learned keys enter by the registry of attention functions, where it is asked: before heads are repeated."""
    module = module_at(model, site.path)
    if getattr(model.config, "attention_type", "") == "block_sparse":
        return replace(site, refuse=SPARSE)
    if not consults(module):
        around = site.refuse == "" and hasattr(module, "logit_scale")
        return replace(site, connect=Connect("", cosine if around else attend))
    if site.refuse == UNEQUAL or hasattr(module, "indexer"):
        return replace(site, refuse=site.refuse or CHOSEN)
    near = [s for s in found if s.depth == site.depth and s.tower == site.tower and s.role.endswith(".k")]
    keys = next((s for s in near if f"{s.path}.".startswith(f"{site.path}.")), None)
    head = next((size for name in HEAD if (size := getattr(module, name, 0))), site.width)
    if keys is None or not head:  # those of another block, which are repeated for the queries behind the registry
        config: Config = model.config
        own = getattr(config.get_text_config(), "num_key_value_heads", None) or site.heads
        heads = own if own and site.heads % own == 0 else site.heads
        return replace(site, heads=heads, connect=Connect("config", view, shift=shifted))
    weight: AnyModule = module_at(model, keys.path)
    total = int(weight_shape(weight)[1 if keys.transposed else 0])
    heads = count_rows(keys.rows, total) // head
    groups = getattr(module, "num_key_value_groups", 1)
    if site.heads and heads not in (site.heads, site.heads // groups):  # several projections make the keys (MLA)
        head, heads = site.width, site.heads // groups
    return replace(site, width=head, heads=heads, refuse="", connect=Connect("config", view, shift=shifted))


def _tokens(model: nn.Module, found: list[Site]) -> list[Site]:
    """Images are sequences that more tokens can stand in, where nothing in the attention counts them."""
    width = {s.path: s.width for s in found if s.role == "block"}
    free = _free(model, found)
    prefix = _prefix(model)

    def place(site: Site) -> Site:
        known = replace(site, width=width[site.path], prefix=prefix)
        return replace(known, refuse="" if site.tower == "image" and free else site.refuse if free else TEXT)

    return [place(site) if site.role == "tokens" else site for site in found]


def _free(model: nn.Module, found: list[Site]) -> bool:
    attentions = [module_at(model, s.path) for s in found if s.role == "kv" and s.tower == "image"]
    return bool(attentions) and all(consults(m) and arguments(m) <= PLAIN for m in attentions)


def _prefix(model: nn.Module) -> int:
    """Tokens before the patches."""
    one = ("cls_token", "class_embedding", "distillation_token")
    return sum(name.endswith(one) for name, _ in own_parameters(model))
