"""AdapterHub folders as they are written, and bottlenecks between a tuning and a folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, Refused
from mmpeft.formats import hub_lora
from mmpeft.formats.content import Content, dump_tensors
from mmpeft.formats.hub import ACTIVATIONS, CONFIG, LAYOUTS, WEIGHTS, Bottleneck, Bottlenecks, Layout, Way
from mmpeft.formats.low_rank import selector
from mmpeft.hosting.host import original_class
from mmpeft.methods.additive.houlsby import Houlsby
from mmpeft.methods.additive.parallel_adapter import ParallelAdapter
from mmpeft.methods.additive.pfeiffer import Pfeiffer
from mmpeft.methods.base import Method
from mmpeft.parts import Branch
from mmpeft.parts.base import Placement
from mmpeft.sites import Site, sites
from mmpeft.surgery.attached import Attached
from mmpeft.types import Json

NAME, VERSION = "default", "adapters.1.3.0"
"""The adapter's name in the keys, and the library that read what is written here."""
PLACES: dict[Way, tuple[str, ...]] = {"serial": ("attn", "mlp"), "parallel": ("attn", "mlp"), "stream": ("block",)}


def layout_of(model: nn.Module) -> Layout:
    """How `adapters` calls the places in a model.

    Raises:
        Refused: it was not compared for such a model.
    """
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind not in LAYOUTS:
        raise Refused(
            f"{type(model).__name__} is none of the models that adapters' names are known for here: "
            f"{', '.join(LAYOUTS)}. Use tuning.save()"
        )
    return LAYOUTS[kind]


def _spots(model: nn.Module, roles: Sequence[str]) -> dict[str, Site]:
    """Sites of these roles by the module whose result they change."""
    return {site.out or site.path: site for site in sites(model) if site.role in roles and not site.refuse}


# -- bottlenecks out of a tuning, and into a model ----------------------------------------------------------


def bottlenecks_of(tuning: Attached) -> Bottlenecks:
    """The bottlenecks of a tuning, which has nothing else.

    Raises:
        Refused: other parts, other places, or bottlenecks of several kinds.
    """
    layout = layout_of(tuning.model)
    found: list[Bottleneck] = []
    kinds: set[tuple[Way, str, float | str]] = set()
    for placement in tuning.placements:
        part, where = placement.part, placement.home
        if type(part) is not Branch or type(part.down) is not nn.Linear:
            raise Refused(
                f"{type(part).__name__} at {where} is no plain bottleneck; an AdapterHub folder holds those alone"
            )
        way = _way_of(part, placement, layout)
        site = _spots(tuning.model, PLACES[way]).get(placement.hooks[-1].path)
        if site is None or site.depth is None or part.channel_dim != -1 or part.drop_path:
            raise Refused(f"{where} ({placement.role}) is no place for a bottleneck of AdapterHub. Use tuning.save()")
        if isinstance(part.scale, Tensor) and part.scale.numel() > 1:
            raise Refused(f"{where} has a learned scale for each channel, which adapters has with a rate of its own")
        if part.activation not in ACTIVATIONS.values():
            raise Refused(
                f"{where} has the activation {part.activation}; adapters are known to have {list(ACTIVATIONS)}"
            )
        scale = part.scale.detach() if isinstance(part.scale, Tensor) else part.scale
        down, up = part.down, part.up
        assert isinstance(down, nn.Linear)
        assert isinstance(up, nn.Linear)
        place = "mlp" if way == "stream" else site.role
        d, bd, u, bu = (tensor.detach() for tensor in (down.weight, down.bias, up.weight, up.bias))
        branch = Bottleneck(site.depth, place, d, bd, u, bu, scale)
        found.append(branch if way == "parallel" else branch.scaled())
        kinds.add(
            (way, part.activation, "learned" if isinstance(scale, Tensor) else scale if way == "parallel" else 1.0)
        )
    if len(kinds) > 1:
        raise Refused(f"there are bottlenecks of {len(kinds)} kinds, {sorted(kinds, key=str)}; a folder has one config")
    ((way, activation, _),) = kinds
    rates = {p.part.dropout for p in tuning.placements if isinstance(p.part, Branch)}
    dropout = rates.pop() if len(rates) == 1 else 0.0
    return Bottlenecks("adapterhub", way=way, activation=activation, branches=found, dropout=dropout)


def _way_of(part: Branch, placement: Placement, layout: Layout) -> Way:
    if part.source == "output":
        return "stream" if placement.role.endswith("block") else "serial"
    if layout.post_norm:
        return "parallel"
    raise Refused(
        f"the bottleneck beside {placement.home} reads what that reads, behind a norm; those of adapters read the sum "
        "before the norm. Use tuning.save()"
    )


def methods_for(model: nn.Module, content: Bottlenecks, where: object) -> tuple[list[Method], dict[str, Bottleneck]]:
    """Methods that place the bottlenecks, one for each size, and the bottleneck of each module.

    Raises:
        AdapterFileError: a block or a width that the model has not.
    """
    spots = _spots(model, PLACES[content.way])
    found: dict[str, Bottleneck] = {}
    sizes: dict[tuple[int, float], list[Site]] = {}
    for branch in content.branches:
        role = "block" if content.way == "stream" else branch.place
        own = [path for path, site in spots.items() if (site.role, site.depth) == (role, branch.depth)]
        if len(own) != 1:
            raise AdapterFileError(
                f"{where}: {type(model).__name__.removeprefix('Tuned')} has {len(own)} places for the bottleneck of "
                f"{branch.place} in block {branch.depth}, expected one; load the base that it was made for"
            )
        site = spots[own[0]]
        if site.width != len(branch.up):
            raise AdapterFileError(
                f"{where}: bottlenecks of width {len(branch.up)}, the model has {site.width} at {site}"
            )
        found[own[0]] = branch
        scale = 0.0 if isinstance(branch.scale, Tensor) else branch.scale
        sizes.setdefault((len(branch.down), scale), []).append(site)
    methods: list[Method] = []
    available = [site for site in sites(model) if site.kind != "param"]
    for (size, scale), chosen in sizes.items():
        options: Json = {"at": selector(chosen, available), "bottleneck": size, "activation": content.activation}
        options["dropout"] = content.dropout
        if content.way == "parallel":
            methods.append(ParallelAdapter(**options, scale=scale or "scalar"))
        else:
            methods.append((Pfeiffer if content.way == "stream" else Houlsby)(**options))
    return methods, found


def fill(placements: Sequence[Placement], found: Mapping[str, Bottleneck]) -> None:
    """Put the tensors of bottlenecks into the parts that were placed for them."""
    for placement in placements:
        if isinstance(placement.part, Branch) and placement.hooks[-1].path in found:
            own = dict(placement.part.named_parameters())
            for name, value in found[placement.hooks[-1].path].tensors().items():
                own[name].copy_(value.view_as(own[name]))


# -- files --------------------------------------------------------------------------------------------------


def folder_files(content: Content, model: nn.Module) -> dict[str, bytes]:
    """Names and bytes of the two files of a folder for `adapters`.

    Raises:
        Refused: what the library has no place for.
    """
    layout = layout_of(model)
    held = content.beside.replace("(IA)³ vectors and ", "").replace("(IA)³ vectors", "")
    held = held or ("biases inside updates" if content.shifts else "")
    if held or content.stacks or content.learned:
        raise Refused(f"an AdapterHub folder has no place for {held or content.method}. Use tuning.save()")
    if isinstance(content, Bottlenecks):
        config, tensors = _bottlenecks(content, model, layout)
    else:
        config, tensors = hub_lora.written(content, model, layout.roles)
    facts: Json = {
        "config": config,
        "hidden_size": model.config.hidden_size,  # type: ignore[union-attr]
        "model_class": original_class(model).__name__,
        "model_name": getattr(model.config, "name_or_path", "") or "",
        "model_type": model.config.model_type,  # type: ignore[union-attr]
        "name": NAME,
        "version": VERSION,
    }
    text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
    return {WEIGHTS: dump_tensors(tensors, {"format": "pt"}), CONFIG: text.encode()}


def _bottlenecks(content: Bottlenecks, model: nn.Module, layout: Layout) -> tuple[Json, dict[str, Tensor]]:
    blocks = {site.depth: path for path, site in _spots(model, ("block",)).items()}
    tensors: dict[str, Tensor] = {}
    places: dict[int, set[str]] = {}
    sizes: dict[int, set[int]] = {}
    for branch in content.branches:
        own = layout.attention if branch.place == "attn" else layout.network
        key = f"{blocks[branch.depth]}.{own}.adapters.{NAME}"
        tensors |= {f"{key}.adapter_down.0.weight": branch.down, f"{key}.adapter_down.0.bias": branch.down_bias}
        tensors |= {f"{key}.adapter_up.weight": branch.up, f"{key}.adapter_up.bias": branch.up_bias}
        tensors |= {f"{key}.scaling": branch.scale} if isinstance(branch.scale, Tensor) else {}
        places.setdefault(branch.depth, set()).add(branch.place)
        sizes.setdefault(branch.depth, set()).add(len(branch.down))
    kinds = {tuple(sorted(own)) for own in places.values()}
    if len(kinds) > 1 or any(len(own) > 1 for own in sizes.values()):
        raise Refused(
            "blocks have bottlenecks at different places, or of two sizes in one; adapters has one config for all"
        )
    width = len(content.branches[0].up)
    factors = {depth: factor(width, min(own)) for depth, own in sizes.items()}
    usual, _ = Counter(factors.values()).most_common(1)[0]
    others = {str(depth): factor for depth, factor in sorted(factors.items()) if factor != usual}
    scale = content.branches[0].scale
    stream = content.way == "stream"
    return {
        "architecture": None,
        "mh_adapter": "attn" in min(kinds),
        "output_adapter": "mlp" in min(kinds),
        "reduction_factor": {**others, "default": usual} if others else usual,
        "non_linearity": next(name for name, own in ACTIVATIONS.items() if own == content.activation),
        "original_ln_before": stream,
        "original_ln_after": not (stream and layout.post_norm),
        "residual_before_ln": not (stream and layout.post_norm),
        "is_parallel": content.way == "parallel",
        "scaling": "learned" if isinstance(scale, Tensor) else float(scale),
        "leave_out": sorted(set(blocks) - set(places)),
        "dropout": content.dropout,
        "ln_before": False,
        "ln_after": False,
        "use_gating": False,
        "phm_layer": False,
        "inv_adapter": None,
        "cross_adapter": False,
    }, tensors


def factor(width: int, size: int) -> float:
    """The `reduction_factor` for which `int(width // factor)` is a size."""
    factor = width / size
    while int(width // factor) < size:
        factor *= 1 - 1e-12
    return factor
