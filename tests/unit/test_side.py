"""Side stacks and conditional blocks: memory, exactness, masks and caches, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import mmpeft
from mmpeft.bench.memory import kept_for_backward
from mmpeft.errors import ConfigError, MMPEFTError, Refused
from tests.matrix.families import FAMILIES
from tests.support.moved import perturb


def _vit(**known: object) -> VisionTransformer:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**{**options, **known}).eval()


# -- LST ----------------------------------------------------------------------------------------------------


def test_lst_keeps_half_of_what_lora_keeps_for_the_backward_pass() -> None:
    x = torch.randn(8, 3, 32, 32)
    kept = {}
    for method in (mmpeft.LoRA(rank=8, at="attn.{q,v}"), mmpeft.LST(), mmpeft.LST(drop=4)):
        model = _vit()
        mmpeft.attach(model, method)
        kept[str(method)] = kept_for_backward(lambda model=model: model(x).square().mean())
    lora, lst, dropped = kept.values()
    assert lst <= 0.5 * lora, kept
    assert dropped < lst


def test_lst_is_the_recurrence_of_the_paper() -> None:
    model, x = _vit(), torch.randn(2, 3, 32, 32)
    hidden: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda m, i, o: hidden.append(o)) for block in model.blocks]
    hooks.append(model.blocks[0].register_forward_pre_hook(lambda m, i: hidden.append(i[0])))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    tuning = mmpeft.attach(model, mmpeft.LST(drop=2, attention=False))
    perturb(tuning)
    rungs = [p.part for p in tuning.placements]
    u = rungs[0].start(hidden[0])
    for rung, h in zip(rungs, hidden[1:]):
        if rung.down is not None:
            mu = torch.sigmoid(rung.alpha / 0.1)
            u = mu * u + (1 - mu) * rung.down(h)
            block = rung.block
            u = u + block.fc2(nn.functional.gelu(block.fc1(block.norm2(u))))
    assert [rung.down is None for rung in rungs] == [True, False, True, False]
    torch.testing.assert_close(model(x), model.head(model.norm(rungs[-1].up(u))[:, 0]), atol=1e-5, rtol=1e-5)


def test_lst_added_to_the_output_starts_from_the_backbone() -> None:
    model, x = _vit(), torch.randn(2, 3, 32, 32)
    plain = model(x)
    tuning = mmpeft.attach(model, mmpeft.LST(output="add"))
    assert torch.equal(model(x), plain)
    assert tuning.liveness(x).check().ok


@pytest.mark.parametrize("family", ["swin", "convnext", "unet2d"])
def test_lst_follows_blocks_whose_width_and_size_change(family: str) -> None:
    example = FAMILIES[family]()
    tuning = mmpeft.attach(example.model, mmpeft.LST(reduction=2))
    assert any(p.part.bridge is not None for p in tuning.placements)
    assert tuning.liveness(example.batch).check().ok


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lst_generates_the_same_with_and_without_a_cache(family: str) -> None:
    model = FAMILIES[family]().model
    perturb(mmpeft.attach(model, mmpeft.LST(reduction=2)))
    ids = torch.randint(5, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    texts = [
        model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)
    with torch.no_grad():  # a later token changes no earlier answer
        other = ids.clone()
        other[:, -1] = 7
        torch.testing.assert_close(model(ids).logits[:, :-1], model(other).logits[:, :-1])


def test_lst_says_what_it_cannot_follow() -> None:
    with pytest.raises(Refused, match="must end at the last block"):
        mmpeft.attach(_vit(), mmpeft.LST(at="block & depth<2"))
    with pytest.raises(Refused, match=r"cannot attend here: .*relative-position"):
        mmpeft.attach(FAMILIES["beit"]().model, mmpeft.LST(attention=True))
    model = _vit()
    mmpeft.attach(model, mmpeft.LST())
    model.set_grad_checkpointing(True)
    with pytest.raises(Refused, match="gradient checkpointing must be off"):
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    model.set_grad_checkpointing(False)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    copy.deepcopy(model)


def test_lst_on_one_tower_of_an_encoder_decoder() -> None:
    example = FAMILIES["t5"]()
    tuning = mmpeft.attach(example.model, mmpeft.LST(at="decoder:block", reduction=2))
    assert tuning.liveness(example.batch).check().ok


# -- CoDA ---------------------------------------------------------------------------------------------------


def test_coda_on_all_tokens_is_the_parallel_adapter() -> None:
    x = torch.randn(2, 3, 32, 32)
    models = [_vit(), _vit()]
    methods = (mmpeft.CoDA(reduction=1, bottleneck=8), mmpeft.ParallelAdapter(at="block", bottleneck=8, scale=1.0))
    tunings = [mmpeft.attach(model, method) for model, method in zip(models, methods)]
    with torch.no_grad():
        for left, right in zip(tunings[0].parameters(), tunings[1].parameters(), strict=True):
            right.copy_(left.normal_(std=0.1))
    assert torch.equal(models[0](x), models[1](x))


@pytest.mark.parametrize(("reduction", "prefix"), [(2, 1), (4, 5), (8, 0), (200, 1)])
def test_coda_runs_the_block_on_the_chosen_tokens(reduction: float, prefix: int) -> None:
    more = {"class_token": prefix > 0, "reg_tokens": max(0, prefix - 1), "global_pool": "avg"}
    model = _vit(**more)
    tuning = mmpeft.attach(model, mmpeft.CoDA(reduction=reduction))
    seen: list[torch.Tensor] = []
    model.blocks[1].attn.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    x = torch.randn(3, 64 + prefix, 96)
    y = model.blocks[1](x)
    k = max(-(-(64 + prefix) // reduction), prefix + 1)
    assert seen[0].shape[1] == k
    (changed,) = ((y - x).abs().sum(-1) > 0).sum(-1).unique().tolist()
    assert changed <= k
    assert ((y - x).abs().sum(-1)[:, :prefix] > 0).all()
    part = tuning.placements[1].part
    index, weights = part._route(x, int(k - prefix))
    few = x.gather(1, index[..., None].expand(-1, -1, 96))
    whole = nn.Module.__call__(_plain_block(model), few)
    expected = x.scatter(1, index[..., None].expand(-1, -1, 96), few + weights[..., None] * (whole - few))
    torch.testing.assert_close(y, expected)


def _plain_block(model: VisionTransformer) -> nn.Module:
    twin = copy.deepcopy(model)
    mmpeft.detach(twin, "default")
    return twin.blocks[1]


def test_coda_learns_which_tokens_to_run() -> None:
    """The router finds the one patch that the answer needs."""
    torch.manual_seed(0)
    model = _vit(depth=2)
    tuning = mmpeft.attach(model, mmpeft.CoDA(reduction=8, epsilon=0.3))
    x = torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.Adam(tuning.parameters(), 1e-2)
    before = tuning.placements[0].part.router.detach().clone()
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(before, tuning.placements[0].part.router)


def test_coda_says_what_it_cannot_run() -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        mmpeft.CoDA(reduction=0.5)
    with pytest.raises(MMPEFTError, match="rotary"):
        mmpeft.attach(FAMILIES["dinov3"]().model, mmpeft.CoDA())
    model = _vit()
    mmpeft.attach(model, mmpeft.CoDA())
    with pytest.raises(Refused, match="attn_mask over all of them"):
        model(torch.randn(1, 3, 32, 32), attn_mask=torch.zeros(1, 1, 65, 65))
