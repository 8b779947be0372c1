"""AdapterFusion, AdapterDrop and AdapterSoup: what they compute, what they keep, what they refuse."""

from __future__ import annotations

import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import mmpeft
from mmpeft.combine.soup import closest
from mmpeft.errors import AdapterFileError, ConfigError, Refused


def _vit(seed: int = 0, depth: int = 4) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**sizes, depth=depth).eval()


X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def _saved(folder: Path, method: mmpeft.methods.Method, seed: int, base: int = 0, by: float = 0.1) -> str:
    """An adapter that started from one set of values and went its own way."""
    torch.manual_seed(11)
    tuning = mmpeft.attach(_vit(base), method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    return str(tuning.save(folder / f"{type(method).__name__}{seed}"))


def _pair(folder: Path, method: mmpeft.methods.Method | None = None, by: float = 0.1) -> list[str]:
    return [_saved(folder, method or mmpeft.Pfeiffer(bottleneck=8), seed, by=by) for seed in (1, 2)]


# -- AdapterFusion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [mmpeft.Pfeiffer(bottleneck=8), mmpeft.ParallelAdapter(bottleneck=4), mmpeft.AdapterPlus(drop_path=0.0)]
)
def test_fusion_is_attention_over_what_adapters_add(tmp_path: Path, method: mmpeft.methods.Method) -> None:
    folders = _pair(tmp_path, method)
    model = _vit()
    tuning = mmpeft.attach(model, mmpeft.AdapterFusion(folders, temperature=2.0))
    part, host = tuning.placements[0].part, tuning._state.hosts[tuning.placements[0].hooks[-1].path]
    x, y = torch.randn(2, 7, 48), torch.randn(2, 7, 48)
    singles = []
    for folder in folders:
        other = _vit()
        (alone, *_) = mmpeft.load(other, folder).placements
        singles.append(alone.part.exit(host, x, y) - y)
    z = torch.stack(singles)  # [N, b, n, d]
    share = ((y @ part.query.t())[None] * (z @ part.key.t())).sum(-1).div(2.0).softmax(0)
    torch.testing.assert_close(part.exit(host, x, y), y + (share[..., None] * (z @ part.value.t())).sum(0))
    torch.testing.assert_close(share.sum(0), torch.ones(2, 7))


def test_fusion_starts_near_the_mean_of_its_adapters_and_its_penalty_is_the_papers(tmp_path: Path) -> None:
    tuning = mmpeft.attach(_vit(), mmpeft.AdapterFusion(_pair(tmp_path)))
    value = tuning.placements[0].part.value
    assert torch.equal(value.diagonal(), torch.ones(48))
    off = 48 * 47 * 1e-12
    assert tuning.controllers.penalty().item() == pytest.approx(0.01 * 4 * off, rel=1e-3)
    with torch.no_grad():
        value.mul_(2)
    assert tuning.controllers.penalty().item() == pytest.approx(0.01 * 48, rel=1e-3)


def test_fusion_freezes_its_adapters_and_needs_their_folders_no_more(tmp_path: Path) -> None:
    folders = _pair(tmp_path)
    model = _vit()
    tuning = mmpeft.attach(model, mmpeft.AdapterFusion(folders))
    assert sum(p.numel() for p in tuning.parameters()) == 4 * 3 * 48**2
    assert tuning.liveness(X).check().ok
    tuning.save(tmp_path / "fusion")
    answer = model(X).detach()
    for folder in folders:
        shutil.rmtree(folder)
    other = _vit()
    again = mmpeft.load(other, tmp_path / "fusion")
    assert torch.equal(other(X), answer)
    assert torch.equal(again.controllers.penalty(), tuning.controllers.penalty())
    members = sum(t.numel() for t in tuning.state_dict().values()) - sum(p.numel() for p in tuning.parameters())
    assert members == 2 * mmpeft.Pfeiffer(bottleneck=8).count(_vit(), mmpeft.sites.sites(_vit()))
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), answer)


def test_methods_alone_read_no_folder_and_mmpefts_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods know no files: whoever brings `attach` brings the reader."""
    folders = _pair(tmp_path)
    assert len(mmpeft.AdapterFusion(folders).resolve(_vit()).members) == 2
    monkeypatch.setattr("mmpeft.methods.saved.READERS", [])
    with pytest.raises(ConfigError, match=r"import mmpeft\.tuning first"):
        mmpeft.AdapterFusion(folders).resolve(_vit())


def test_fusion_says_what_it_cannot_fuse(tmp_path: Path) -> None:
    one, two = _pair(tmp_path)
    lora = _saved(tmp_path, mmpeft.LoRA(rank=2), 1)
    everywhere = _saved(tmp_path, mmpeft.Houlsby(bottleneck=8), 1)
    foreign = _saved(tmp_path, mmpeft.Pfeiffer(bottleneck=4), 7, base=5)
    for adapters, error, why in (
        ([], ConfigError, "at least two"),
        ([one], ConfigError, "at least two"),
        ([one, lora], Refused, "bottleneck adapters; .*LoRA"),
        ([one, everywhere], Refused, "on the same sites"),
        ([one, foreign], AdapterFileError, "another base"),
        ([one, str(tmp_path / "nowhere")], AdapterFileError, "does not exist"),
    ):
        model = _vit()
        plain = model(X)
        with pytest.raises(error, match=why):
            mmpeft.attach(model, mmpeft.AdapterFusion(adapters))
        assert type(model) is VisionTransformer
        assert torch.equal(model(X), plain)
    model = _vit()
    mmpeft.load(model, two, "own")
    mmpeft.attach(model, mmpeft.AdapterFusion([one, two]), "fused")
    assert list(mmpeft.tunings(model)) == ["own", "fused"]


# -- AdapterDrop --------------------------------------------------------------------------------------------


def _dropping(drop: int | None = None) -> tuple[VisionTransformer, mmpeft.Tuning]:
    model = _vit()
    return model, mmpeft.attach(model, mmpeft.AdapterDrop(mmpeft.Pfeiffer(bottleneck=8), drop=drop))


def _resting(tuning: mmpeft.Tuning) -> int:
    return sum(p.part.resting for p in tuning.placements)


def test_each_step_leaves_out_a_number_of_first_layers_and_the_rest_is_whole() -> None:
    model, tuning = _dropping(drop=2)
    whole = model(X)
    control, seen = tuning.controllers, []
    control.fit_start(20)
    for _ in range(20):
        control.before_forward()
        n = _resting(tuning)
        seen.append(n)
        control.before_forward()  # a second micro-batch of the same step
        assert _resting(tuning) == n
        grads = torch.autograd.grad(model(X).sum(), list(tuning.parameters()), allow_unused=True)
        reached = [any(g is not None for g in grads[4 * i : 4 * i + 4]) for i in range(4)]
        assert reached == [i >= n for i in range(4)]
        control.after_step()
        assert _resting(tuning) == 0
    assert set(seen) == {0, 1, 2}
    assert torch.equal(model(X), whole)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_left_out_layers_run_plain_and_keep_nothing(n: int, tmp_path: Path) -> None:
    model, tuning = _dropping()
    tuning.leave_out(n)
    reference = _vit()
    other = mmpeft.attach(reference, mmpeft.Pfeiffer(bottleneck=8).where(f"depth>={n}"))
    other.load_state_dict({k: v for k, v in tuning.state_dict().items() if int(k.split(".")[1]) >= n})
    assert torch.equal(model(X), reference(X))
    tuning.save(tmp_path, inference=True)
    again = _vit()
    kept = mmpeft.load(again, tmp_path)
    assert sum(p.numel() for p in kept.parameters()) == sum(p.numel() for p in other.parameters())
    assert torch.equal(again(X), model(X))
    tuning.leave_out(0)
    assert _resting(tuning) == 0


def test_any_method_of_sites_can_leave_layers_out_and_merges_without_them() -> None:
    model = _vit()
    plain = model(X)
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2))
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.normal_(std=0.1)
    full = model(X)
    tuning.leave_out(3)
    partly = model(X)
    assert not torch.allclose(partly, full)
    assert not torch.allclose(partly, plain)
    tuning.merge()
    torch.testing.assert_close(model(X), partly, atol=1e-5, rtol=1e-5)
    tuning.unmerge()
    with pytest.raises(ConfigError, match="from 0 to 3"):
        tuning.leave_out(4)
    with pytest.raises(Refused, match="do not act at one site"):
        mmpeft.attach(_vit(), mmpeft.VPT()).leave_out(1)
    with pytest.raises(ConfigError, match="act at one site"):
        mmpeft.AdapterDrop(mmpeft.VPT())
    with pytest.raises(ConfigError, match="leaves no block"):
        _dropping(drop=4)


# -- AdapterSoup --------------------------------------------------------------------------------------------


def test_soup_is_the_weighted_mean_of_tensors(tmp_path: Path) -> None:
    folders = _pair(tmp_path, by=0.005)
    model = _vit()
    tuning = mmpeft.soup(model, folders, [3, 1])
    parts = [mmpeft.load(_vit(), folder).state_dict() for folder in folders]
    for name, tensor in tuning.state_dict().items():
        torch.testing.assert_close(tensor, 0.75 * parts[0][name] + 0.25 * parts[1][name])
    tuning.save(tmp_path / "soup")
    other = _vit()
    mmpeft.load(other, tmp_path / "soup")
    assert torch.equal(other(X), model(X))


def test_soup_of_tunings_is_exact_where_the_answer_is_linear_in_the_tensors(tmp_path: Path) -> None:
    model = _vit()
    biases = [mmpeft.attach(model, mmpeft.BitFit(), name) for name in ("a", "b")]  # no random start, no warning
    with torch.no_grad():
        for tuning in biases:
            for parameter in tuning.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning = mmpeft.soup(model, biases)
    for name, value in tuning.state_dict().items():
        torch.testing.assert_close(value, (biases[0].state_dict()[name] + biases[1].state_dict()[name]) / 2)


def test_soup_warns_of_other_starts_and_refuses_other_methods(tmp_path: Path) -> None:
    far = _pair(tmp_path / "far", by=1.0)
    with pytest.warns(UserWarning, match="did not start from the same values"):
        mmpeft.soup(_vit(), far)
    near = _pair(tmp_path, mmpeft.Pfeiffer(bottleneck=4), by=0.005)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mmpeft.soup(_vit(), near)
    foreign = _saved(tmp_path, mmpeft.Pfeiffer(bottleneck=4), 7, base=5)
    for adapters, weights, error, why in (
        ([near[0]], None, ConfigError, "at least two"),
        ([near[0], far[0]], None, ConfigError, "one method on the same sites"),
        (near, [1.0], ConfigError, "2 weights"),
        (near, [0.0, 0.0], ConfigError, "not all 0"),
        ([near[0], foreign], None, AdapterFileError, "another base"),
    ):
        model = _vit()
        with pytest.raises(error, match=why):
            mmpeft.soup(model, adapters, weights)
        assert type(model) is VisionTransformer


def test_the_closest_sources_are_those_with_like_data() -> None:
    model = _vit()
    generator = torch.Generator().manual_seed(0)
    patterns = {name: torch.randn(3, 32, 32, generator=generator) for name in "abc"}

    def batches(pattern: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(pattern + 0.3 * torch.randn(8, 3, 32, 32), torch.zeros(8)) for _ in range(2)]

    sources = {name: batches(pattern) for name, pattern in patterns.items()}
    assert closest(model, batches(patterns["b"]), sources, top=2)[0] == "b"
    assert not model.training
    assert not model.blocks[-1]._forward_hooks


def test_the_former_names_go_on_working(tmp_path: Path) -> None:
    tuning = mmpeft.attach(_vit(), mmpeft.LoRA())
    for call in (tuning.bake, tuning.compact, lambda: tuning.save(tmp_path, bake=True)):
        with pytest.warns(DeprecationWarning, match="inference"):
            call()
