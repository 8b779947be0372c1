"""Running statistics: a frozen base's stay, a tuning's are its own; every right value is an untouched copy's."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.layers.evo_norm import EvoNorm2dB0
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import AdapterFileError, Refused, SiteError
from mmpeft.sites import Site, anatomy, qualified_name

WIDTH = 8
LORA = mmpeft.LoRA(rank=2, at="attn.q")

NORMS = {
    "batch": nn.BatchNorm2d,
    "cumulative": partial(nn.BatchNorm2d, momentum=None),
    "no affine": partial(nn.BatchNorm2d, affine=False),
    "instance": partial(nn.InstanceNorm2d, track_running_stats=True, affine=True),
    "act": BatchNormAct2d,
    "evo": EvoNorm2dB0,
}


class Layer(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.q, self.norm = nn.Conv2d(WIDTH, WIDTH, 1), norm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.q(x))


class Net(nn.Module):
    """A stem outside of every site, two blocks, and a head with a norm in it."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 1), norm(WIDTH))
        self.blocks = nn.Sequential(Layer(norm), Layer(norm))
        self.head = nn.Sequential(nn.BatchNorm1d(WIDTH, affine=False), nn.Linear(WIDTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@anatomy(qualified_name(Net))
def _net(model: nn.Module) -> list[Site]:
    found = []
    for i in range(len(model.blocks)):
        path = f"blocks.{i}"
        found += [Site(f"{path}.q", "attn.q", i, kind="conv"), Site(f"{path}.norm", "norm", i, kind="norm")]
        found += [Site(path, "block", i, width=WIDTH, channel_dim=1)]
    return [*found, Site("head", "head")]


def _made(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(norm)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(torch.rand_like(tensor) * 0.3)
    return model


def _x(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def _base(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if ".mmpeft." not in n}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _step(model: nn.Module, parameters: list[nn.Parameter], seed: int = 0) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model(_x(seed)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_frozen_base_keeps_its_statistics_in_training_too(norm: type[nn.Module]) -> None:
    model = _made(norm)
    plain = copy.deepcopy(model).eval()
    tuning = mmpeft.attach(model, LORA)
    model.train()
    assert all(module.training for module in model.modules())
    assert torch.equal(model(_x()), plain(_x()))
    _step(model, list(tuning.parameters()))
    assert _same(_base(model), _base(plain))
    with mmpeft.use(model, None):
        assert torch.equal(model(_x()), plain(_x()))
    assert _same(_base(model), _base(plain))
    tuning.detach()
    assert _same(model.state_dict(), plain.state_dict())
    assert all(module.training for module in model.modules())
    model(_x())
    assert not _same(_base(model), _base(plain)), "the detached model is no ordinary one"


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("method", [mmpeft.Full(), LORA + mmpeft.BatchStatistics()], ids=["Full", "BatchStatistics"])
def test_statistics_that_are_asked_for_are_those_of_plain_training(
    norm: type[nn.Module], method: mmpeft.methods.Method
) -> None:
    model = _made(norm)
    plain, base = copy.deepcopy(model).train(), _base(model)
    mmpeft.attach(model, method)
    model.train()
    for seed in range(3):
        assert torch.equal(model(_x(seed)), plain(_x(seed)))
    model.eval(), plain.eval()
    assert torch.equal(model(_x()), plain(_x()))
    assert _same(_base(model), base)


def test_a_reloaded_tuning_answers_as_the_trained_one_and_detach_gives_the_base_back(tmp_path: Path) -> None:
    model, other = _made(), _made()
    base = _base(model)
    tuning = mmpeft.attach(model, mmpeft.Full())
    model.train()
    for seed in range(3):
        _step(model, list(tuning.parameters()), seed)
    model.eval()
    answer = model(_x())
    assert (answer - other.eval()(_x())).abs().max() > 0.1
    again = mmpeft.load(other, tuning.save(tmp_path))
    assert torch.equal(other(_x()), answer)
    assert (
        int(again.state_dict()["stem.1.statistics.num_batches_tracked"]) == int(base["stem.1.num_batches_tracked"]) + 3
    )
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(_x()), answer)
        copied.train()
        copied(_x(5))
        assert not torch.equal(copied.eval()(_x()), answer)
    assert torch.equal(model(_x()), answer)
    tuning.merge()
    assert (model(_x()) - answer).abs().max() < 1e-5
    tuning.unmerge()
    assert torch.equal(model(_x()), answer)
    tuning.detach()
    assert _same(_base(model), base)
    assert type(model.stem[1]) is nn.BatchNorm2d


def _moved(model: nn.Module, method: mmpeft.methods.Method) -> set[str]:
    tuning = mmpeft.attach(model, method)
    return {
        name.removesuffix(".statistics.running_var") for name in tuning.state_dict() if name.endswith("running_var")
    }


ALL = {"stem.1", "blocks.0.norm", "blocks.1.norm", "head.0"}


@pytest.mark.parametrize(
    ("method", "moved"),
    [
        (mmpeft.Full(), ALL),
        (mmpeft.Full(at="block & depth=0"), {"blocks.0.norm"}),
        (mmpeft.Full(at="attn.q"), set()),
        (mmpeft.Full().where("depth>=1"), {"blocks.1.norm"}),
        (mmpeft.LastBlocks(), {"blocks.1.norm"}),
        (mmpeft.LinearProbe(), {"head.0"}),
        (mmpeft.NormTuning(), set()),
        (mmpeft.BitFit(), set()),
        (LORA, set()),
        (mmpeft.BatchStatistics(), ALL),
        (mmpeft.BatchStatistics(at="norm"), {"blocks.0.norm", "blocks.1.norm"}),
        (mmpeft.BatchStatistics().where("depth=0"), ALL),
        (mmpeft.LastBlocks() + mmpeft.BatchStatistics(), ALL),
        (mmpeft.NormTuning() + mmpeft.BatchStatistics(at="block"), {"blocks.0.norm", "blocks.1.norm"}),
    ],
    ids=lambda value: "-".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_which_statistics_move(method: mmpeft.methods.Method, moved: set[str]) -> None:
    assert _moved(_made(), method) == moved


def test_weights_of_norms_train_on_still_statistics() -> None:
    model = _made()
    plain = copy.deepcopy(model).eval()
    tuning = mmpeft.attach(model, mmpeft.NormTuning())
    model.train()
    model(_x()).square().sum().backward()
    plain(_x()).square().sum().backward()
    for name, parameter in tuning.named_parameters():
        path, _, key = name.rpartition(".normtuning_")
        assert torch.allclose(parameter.grad, plain.get_parameter(f"{path}.{key.removesuffix('.value')}").grad)


def test_each_tuning_has_its_own_statistics() -> None:
    model = _made()
    plain = _made().eval()
    singles = []
    for seed in (0, 1):
        alone = _made().train()
        alone(_x(seed))
        singles.append(alone.eval())
        mmpeft.attach(model, mmpeft.BatchStatistics(), name="ab"[seed])
        model.train()
        model(_x(seed))
    mmpeft.attach(model, LORA, name="c")
    model(_x(3))
    model.eval()
    x = _x(9)
    for name, right in (("a", singles[0]), ("b", singles[1]), ("c", plain), (None, plain)):
        with mmpeft.use(model, name):
            assert torch.equal(model(x), right(x))
    with torch.no_grad(), mmpeft.use(model, ["a", "b", None, "c"]):
        rows = torch.stack([m(x)[i] for i, m in enumerate((*singles, plain, plain))])
        assert torch.allclose(model(x), rows, atol=1e-6)
    mmpeft.detach(model, "c")
    model.train()
    with mmpeft.use(model, None):
        assert torch.equal(model(x), plain(x))
    mmpeft.detach(model, "a")
    mmpeft.detach(model, "b")
    assert _same(model.state_dict(), plain.state_dict())


def test_statistics_alone_are_a_tuning_like_any_other() -> None:
    model = _made()
    tuning = mmpeft.attach(model, mmpeft.BatchStatistics())
    found = tuning.liveness(_x())
    assert found.ok
    assert not found.pulses
    assert "BatchStatistics" in str(tuning.report())
    assert tuning.method == mmpeft.methods.spec.from_spec(mmpeft.methods.spec.to_spec(tuning.method))
    mmpeft.attach(model, mmpeft.BatchStatistics(), name="other")
    with pytest.raises(Refused, match="cannot run together"):
        mmpeft.use(model, mmpeft.Together(("default", "other")))


def test_liveness_names_no_buffer_where_statistics_are_still_or_the_tunings() -> None:
    for method in (LORA, mmpeft.Full(), mmpeft.LastBlocks()):
        model = _made()
        base = copy.deepcopy(model.state_dict())
        tuning = mmpeft.attach(model, method)
        assert not tuning.liveness(_x()).moved
        assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items() if name in base)


def test_statistics_at_half_strength_and_their_soup() -> None:
    model = _made()
    for name, seed in (("a", 0), ("b", 1)):
        mmpeft.attach(model, mmpeft.BatchStatistics(), name=name)
        model.train()
        model(_x(seed))
    model.eval()
    a, b = (mmpeft.tunings(model)[name].state_dict() for name in "ab")
    with mmpeft.use(model, mmpeft.Together(("a",), (0.5,))):
        own = model.stem[1].running_mean
        assert torch.allclose(own, (model.stem[1]._buffers["running_mean"] + a["stem.1.statistics.running_mean"]) / 2)
        model(_x())
    soup = mmpeft.soup(model, [mmpeft.tunings(model)[name] for name in "ab"]).state_dict()
    for name, tensor in soup.items():
        assert torch.allclose(tensor.float(), ((a[name].float() + b[name].float()) / 2), atol=1)


def test_recomputation_moves_statistics_once() -> None:
    models = [_made(), _made()]
    for model, mode in zip(models, (None, "block")):
        tuning = mmpeft.attach(model, mmpeft.Full())
        tuning.recompute = mode
        model.train()
        model(_x()).square().sum().backward()
    one, two = (mmpeft.tunings(model)["default"].state_dict() for model in models)
    assert _same(one, two)


def test_compiled_models_keep_and_move_statistics_alike() -> None:
    torch._dynamo.reset()
    model = _made()
    plain = copy.deepcopy(model).eval()
    mmpeft.attach(model, LORA)
    model.train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(_x()), plain(_x()), atol=1e-6)
    assert _same(_base(model), _base(plain))
    model.eval()
    assert torch.allclose(compiled(_x()), plain(_x()), atol=1e-6)
    torch._dynamo.reset()
    other = _made()
    mmpeft.attach(other, mmpeft.Full())
    other.train(), plain.train()
    compiled = torch.compile(other, backend="eager")
    assert torch.allclose(compiled(_x()), plain(_x()), atol=1e-6)
    other.eval(), plain.eval()
    assert torch.allclose(other(_x()), plain(_x()), atol=1e-6)


def test_modes_are_read_and_set_as_ever() -> None:
    model = _made()
    mmpeft.attach(model, LORA)
    norm = model.stem[1]
    for mode in (True, False, True):
        model.train(mode)
        assert norm.training is mode
    norm.eval()
    assert not norm.training
    modes = {module: module.training for module in model.modules()}  # as Lightning does around validation
    model.eval()
    for module, mode in modes.items():
        module.train(mode)
    assert not norm.training
    norm.train()
    mmpeft.detach(model, "default")
    assert norm.training


def test_synchronised_norms_stay_without_any_process_group() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(_made())
    plain = copy.deepcopy(model).eval()
    mmpeft.attach(model, LORA)
    assert torch.equal(model.train()(_x()), plain(_x()))


def test_update_bn_cannot_wipe_the_base() -> None:
    model = _made()
    base = _base(model)
    tuning = mmpeft.attach(model, LORA)
    with pytest.raises(Refused, match="BatchStatistics"):
        torch.optim.swa_utils.update_bn([_x()], model)
    assert _same(_base(model), base)
    tuning.detach()
    mmpeft.attach(model, LORA + mmpeft.BatchStatistics())
    plain = _made()
    for own in (model, plain):
        torch.optim.swa_utils.update_bn([_x(), _x(1)], own)
    assert torch.equal(model.eval()(_x()), plain.eval()(_x()))
    assert _same(_base(model), base)


def test_what_keeps_no_statistics_is_left_alone() -> None:
    model = _made(partial(nn.BatchNorm2d, track_running_stats=False))
    kinds = [type(m) for m in model.modules()]
    mmpeft.attach(model, LORA)
    assert type(model.stem[1]) is nn.BatchNorm2d
    mmpeft.detach(model, "default")
    assert [type(m) for m in model.modules()] == kinds
    frozen = _made(FrozenBatchNormAct2d)
    mmpeft.attach(frozen, LORA)
    assert type(frozen.stem[1]) is FrozenBatchNormAct2d
    from tests.unit.toy import Toy

    with pytest.raises(SiteError, match="no norm with running statistics"):
        mmpeft.attach(Toy(), mmpeft.BatchStatistics())


def test_statistics_of_a_file_are_checked(tmp_path: Path) -> None:
    tuning = mmpeft.attach(_made(), mmpeft.BatchStatistics())
    tensors = tuning.state_dict()
    key = "stem.1.statistics.running_var"
    with pytest.raises(AdapterFileError, match=key):
        tuning.load_state_dict({**tensors, key: tensors[key] * float("nan")})


def _hybrid() -> nn.Module:
    """`vit_base_mci_224` in small."""
    torch.manual_seed(0)
    stem = ConvStem(channels=(4, 8, 16), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0)
    embed = partial(HybridEmbed, backbone=stem, proj=False)
    options = {"img_size": 32, "patch_size": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    return VisionTransformer(embed_layer=embed, **options)


def _resnet_pair() -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


def test_real_backbones_answer_as_in_evaluation(tmp_path: Path) -> None:
    model, x = _hybrid(), torch.randn(2, 3, 32, 32)
    plain = copy.deepcopy(model).eval()
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2) + mmpeft.LinearProbe())
    model.train()
    assert torch.equal(model(x), plain(x))
    loss = model(x).square().sum()
    loss.backward()
    torch.optim.SGD(list(tuning.parameters()), lr=0.1).step()
    answer = model.eval()(x)
    mmpeft.load(plain, tuning.save(tmp_path))
    assert torch.equal(plain(x), answer)


def test_the_image_tower_of_a_pair_stays_while_its_text_is_tuned() -> None:
    model, x = _resnet_pair(), torch.randn(2, 3, 32, 32)
    plain = copy.deepcopy(model).eval()
    mmpeft.attach(model, mmpeft.LoRA(rank=2, at="text:mlp.*"))
    model.train()
    assert torch.equal(model.encode_image(x), plain.encode_image(x))
    assert torch.equal(model.visual(x), plain.visual(x))
    assert _same(_base(model), _base(plain))
