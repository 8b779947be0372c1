"""What the anatomies say of diffusers' modules, checked by running the models."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

import mmpeft
from mmpeft.diffusion.anatomy import PRESETS
from mmpeft.errors import Refused
from mmpeft.sites import ROLES, Site, structure
from mmpeft.sites.selector import select
from tests.matrix.example import Example
from tests.matrix.families.diffusers import FAMILIES, SD3, SD_UNET, _build, _pixart_inputs

DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
VARIANTS: dict[str, Callable[[], Example]] = {
    "sd2_unet": partial(
        SD_UNET, use_linear_projection=True, resnet_time_scale_shift="scale_shift",
        down_block_types=(DOWN, DOWN), up_block_types=(UP, UP),
    ),
    "if_unet": partial(
        SD_UNET, mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ),
    "sd3_plain": SD3,
    "transformer2d": partial(
        _build, Transformer2DModel, _pixart_inputs, num_attention_heads=2, attention_head_dim=8, in_channels=4,
        norm_num_groups=2, cross_attention_dim=12, activation_fn="gelu", num_layers=2,
    ),
}  # fmt: skip
ALL = {**FAMILIES, **VARIANTS}
families = pytest.mark.parametrize("family", ALL)
MAPS, PAIRS = ("unet2d", "if_unet"), ("sd3", "sd3_plain", "flux")


def rows_of(site: Site) -> slice:
    return slice(*site.rows) if site.rows else slice(None)


def first(y: Any) -> Any:
    return y[0] if isinstance(y, tuple) else y


class Record:
    """Inputs and outputs of every call of every module in one forward pass, and the order in which calls end."""

    def __init__(self, model: nn.Module, batch: dict[str, Any]) -> None:
        self.calls: dict[str, list[tuple[list[Tensor], Any]]] = defaultdict(list)
        self.order: list[str] = []
        handles = [m.register_forward_hook(partial(self._keep, p), with_kwargs=True) for p, m in model.named_modules()]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()

    def _keep(self, path: str, module: nn.Module, args: Any, kwargs: dict[str, Any], y: Any) -> None:
        self.calls[path].append(([a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)], y))
        self.order.append(path)

    def input(self, path: str, number: int = 0) -> Tensor:
        return self.calls[path][0][0][number]

    def output(self, path: str) -> Any:
        return self.calls[path][0][1]


def check_structure(model: Any) -> list[Site]:
    """What holds without running the model; also for a model on the meta device."""
    sites, modules = structure(model), dict(model.named_modules())
    assert len({(s.path, s.role, s.rows) for s in sites}) == len(sites), "a site is named twice"
    classes = {"linear": nn.Linear, "conv": nn.Conv2d, "embedding": nn.Embedding}
    parts: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        assert (site.role in ROLES, site.tower) == (True, "unet" if hasattr(model, "down_blocks") else "dit"), site
        assert isinstance(modules[site.path], classes.get(site.kind, nn.Module)), site
        assert {s for s in (site.stream, site.out, site.entry) if s} <= set(modules), site
        if site.kind != "module":
            parts[site.path].append(site)
    blocks = sorted((s for s in sites if s.role == "block"), key=lambda s: s.depth)
    assert [s.depth for s in blocks] == list(range(len(blocks)))
    for site in sites:
        inside = [b.depth for b in blocks if f"{site.path}.".startswith(f"{b.path}.")]
        assert [site.depth] == (inside or [-1]), site
    norms = {p for p, m in modules.items() if "Norm" in type(m).__name__ and m._parameters.get("weight") is not None}
    assert set(parts) == {p for p, m in modules.items() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))} | norms
    for path, own in parts.items():
        rows = [row for s in own for row in range(*(s.rows or (0, len(modules[path].weight))))]
        assert rows == list(range(len(modules[path].weight))), path
    return sites


@families
def test_structure_and_depth(family: str) -> None:
    """Depth is the order of execution."""
    model, batch, _ = ALL[family]()
    depth = {s.path: s.depth for s in check_structure(model) if s.role == "block"}
    assert [depth[path] for path in Record(model, batch).order if path in depth] == list(range(len(depth)))


@families
def test_every_module_is_called_and_every_row_counts(family: str) -> None:
    """Other values in the rows of a site change the output; of a refused one they change nothing."""
    model, batch, _ = ALL[family]()
    record, sites = Record(model, batch), [s for s in structure(model) if s.kind != "module"]
    dead = {"sd3": {"attn.add_q_proj", "attn.norm_added_q"}, "sd3_plain": {"attn.add_q_proj"}}.get(family, set())
    assert {s.path for s in sites if s.refuse} == {f"transformer_blocks.2.{name}" for name in dead}
    with torch.no_grad():
        before = model(**batch)[0]
        for site in sites:
            again = family == "dit" and site.path.startswith("transformer_blocks.0.norm1.emb.")  # for the last norm
            assert len(record.calls[site.path]) == (2 if again else 1), site
            rows = model.get_submodule(site.path).weight.data[rows_of(site)]  # type: ignore[index]
            kept = rows.clone()
            rows += rows.std().clamp(min=0.1) * torch.randn(rows.shape, generator=torch.manual_seed(0))
            after = model(**batch)[0]
            rows.copy_(kept)
            assert torch.equal(after, before) if site.refuse else (after - before).abs().max() > 1e-4, site


@families
def test_widths_entries_and_gates(family: str) -> None:
    """Also: `mlp.gate` rows are what the activation is applied to, and `mlp.up` rows are multiplied with that."""
    model, batch, _ = ALL[family]()
    record, sites = Record(model, batch), structure(model)
    beside = {"to_q": "to_v", "add_q_proj": "add_v_proj", "proj_mlp": "attn.to_q"}
    for site in sites:
        if site.kind == "norm":
            assert record.input(site.path).shape[site.channel_dim] == site.width, site
        elif site.role in ("block", "attn", "cross", "mlp"):
            y = record.output(site.path)  # SD3's last block returns no context
            assert (y[-1] if site.role == "block" and site.refuse else first(y)).shape[site.channel_dim] == site.width
            assert all(record.input(path).shape[-1] == site.width for path in (site.stream, site.entry) if path), site
        if site.entry:
            parent, name = site.entry.rsplit(".", 1)
            assert torch.equal(record.input(site.entry), record.input(f"{parent}.{beside[name]}")), site
        if site.role == "mlp.gate":
            up = next(s for s in sites if s.role == "mlp.up" and s.path == site.path)
            y, inner = record.output(site.path), record.output(site.path.removesuffix(".proj"))
            torch.testing.assert_close(inner, y[..., rows_of(up)] * nn.functional.gelu(y[..., rows_of(site)]))


@families
def test_residual(family: str) -> None:
    """Between two `stream`s the residual stream grows by what sub-layers put out, times one gate for each channel."""
    model, batch, _ = ALL[family]()
    record, sites = Record(model, batch), structure(model)
    for block in (s for s in sites if s.role == "block"):
        subs = [s for s in sites if s.role in ("attn", "cross", "mlp") and s.path.startswith(f"{block.path}.")]
        start, end = record.input(block.path), record.output(block.path)
        if block.channel_dim == 1:
            for sub in subs:  # attention on a map
                torch.testing.assert_close(start + record.output(sub.path).mT.reshape(end.shape), end)
            continue
        ends = {"image": (start, end)}
        if isinstance(end, tuple):
            ends = {"image": (start, end[1]), "context": (record.input(block.path, 1), end[0])}
        if block.path.startswith("single"):
            ends = {"both": (torch.cat([record.input(block.path, 1), start], 1), torch.cat(end, 1))}
        for name, (start, stop) in ends.items():
            own = [s for s in subs if ("context" in s.stream) == (name == "context")]
            assert bool(own) == (stop is not None)
            states = [*map(record.input, reads := [*dict.fromkeys(s.stream for s in own)]), stop]
            assert not own or torch.equal(states[0], start)
            for i, path in enumerate(reads):
                group = [s for s in own if s.stream == path]
                assert len({s.role for s in group}) == 1, "side by side stand SD3.5's two attentions alone"
                added = torch.stack([first(record.output(s.path)) for s in group], -1).transpose(1, 2)
                gates = torch.linalg.lstsq(added, (states[i + 1] - states[i]).transpose(1, 2)[..., None]).solution
                grown = states[i] + (added @ gates)[..., 0].transpose(1, 2)
                torch.testing.assert_close(grown, states[i + 1], atol=1e-4, rtol=1e-4)
                assert gates.abs().mean() > 0.05, f"{path}: nothing is added, the test is vacuous"
                plain = "unet" in family or path.endswith("attn2") or family == "transformer2d"  # PixArt's attn2
                assert bool((gates - 1).abs().max() < 1e-2) == plain, path


@families
def test_methods_live(family: str) -> None:
    """What a user asks for first works, every tensor of it learns, and sites stay what they were."""
    model, batch, _ = ALL[family]()
    before = structure(model)
    crossed, subs = "cross.q" in (roles := {s.role for s in before}), "|".join(sorted(roles & {"attn", "cross", "mlp"}))
    methods: list[mmpeft.Method] = [mmpeft.SSF(), mmpeft.Houlsby(at=subs), mmpeft.ParallelAdapter(at=subs)]
    methods += [mmpeft.LoRA(at=at) for at in ("attn.{q,v}|cross.{q,v}", "cross.*") if crossed]
    if family in MAPS:
        methods.append(mmpeft.LoRA(rank=2, at="attn.*|conv"))
        refused: dict[str, mmpeft.Method] = {"maps": mmpeft.VPT(deep=True), "residual": mmpeft.AdaptFormer(at="attn")}
    else:
        methods += [mmpeft.LoRA(rank=2, at="attn.*|mlp.*"), mmpeft.AdaptFormer(at=subs)]
        refused = {"two streams": mmpeft.VPT(deep=True), "image and context": mmpeft.AdapterPlus()}
    if family not in PAIRS + MAPS:
        methods, refused = [*methods, *refused.values()], {}
    for method in methods:
        (tuning := mmpeft.attach(model, method)).liveness(batch).check()
        assert structure(model) == before, f"{method}: a second tuning sees other sites"
        tuning.detach()
    for reason, method in refused.items():
        with pytest.raises(Refused, match=reason):
            mmpeft.attach(model, method)


def test_stable_diffusion() -> None:
    """The UNet of SD 1.5, at full size on the meta device: 16 cross-attention blocks among 22 ResNet blocks."""
    with torch.device("meta"):
        sites = check_structure(UNet2DConditionModel(cross_attention_dim=768))
    attention = [f"{role}{name}" for role in ("attn", "cross") for name in ("", ".q", ".k", ".v", ".out")]
    counts = dict.fromkeys([*attention, "mlp", "mlp.up", "mlp.gate", "mlp.down", "tokens"], 16)
    counts |= {"embed": 1, "head": 1, "stack": 3, "kv": 32}
    counts |= {"conv": 2 * 22 + 14 + 3 + 3, "time": 22 + 2, "norm": 2 * 22 + 4 * 16 + 1, "block": 38, "proj": 2 * 16}
    assert Counter(s.role for s in sites) == counts


def test_a_block_that_changes_its_width_takes_no_adapter_beside_it() -> None:
    model, *_ = FAMILIES["sd_unet"]()
    with pytest.raises(Refused, match=r"channels and gives .* Put a serial adapter there"):
        mmpeft.attach(model, mmpeft.ParallelAdapter(at="block", bottleneck=4))
    assert len(mmpeft.attach(model, mmpeft.Pfeiffer(at="block", bottleneck=4)).placements) > 4


def test_presets_select_halves_of_sdxl() -> None:
    """The UNet of SDXL at full size: 70 transformer blocks, ten of them in each of B-LoRA's halves."""
    with torch.device("meta"):
        model = UNet2DConditionModel(
            down_block_types=("DownBlock2D", DOWN, DOWN), up_block_types=(UP, UP, "UpBlock2D"),
            block_out_channels=(320, 640, 1280), cross_attention_dim=2048, transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20), use_linear_projection=True,
        )  # fmt: skip
        sites = check_structure(model)
    assert len(select(sites, "cross.q")) == 70
    content, style = ({s.path for s in select(sites, f"attn.* & {PRESETS[name]}")} for name in ("content", "style"))
    assert (len(content), len(style), len(content & style)) == (40, 40, 0)


@pytest.mark.parametrize("family", ["sd_unet", "pixart", "flux"])
def test_fused_projections_are_refused_until_unfused(family: str) -> None:
    model, batch, _ = FAMILIES[family]()
    with torch.no_grad():
        model.fuse_qkv_projections()  # type: ignore[operator]
    with pytest.raises(Refused, match="unfuse_qkv_projections"):
        mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.{q,v}"))
    model.unfuse_qkv_projections()  # type: ignore[operator]
    mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.*")).liveness(batch).check()
