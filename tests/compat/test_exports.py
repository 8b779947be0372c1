"""What leaves Python: torch.export, torch.compile, TorchScript, ONNX, torch.fx."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import MMPEFTError
from tests.compat.models import ALL, bend, causal, close, differ, images, plain, tuned, untouched, vit, words
from tests.compat.rows import row
from tests.matrix.families import FAMILIES


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class _Logits(nn.Module):
    """Logits alone, as exporters want them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, use_cache=False).logits


@row("torch", "`torch.export` of a tuned model, strict and not, and of the merged one; saved and loaded")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_export(strict: bool, merged: bool, tmp_path: Path) -> None:
    model = vit()
    tuning, before, expected = tuned(model)
    if merged:
        tuning.merge()
    program = torch.export.export(model, (images(),), strict=strict)
    close(program.module()(images(seed=1)), expected(images(seed=1)), 1e-4)
    differ(program.module()(images(seed=1)), before(images(seed=1)))
    torch.export.save(program, tmp_path / "model.pt2")
    close(torch.export.load(tmp_path / "model.pt2").module()(images()), expected(images()), 1e-4)


@row("torch", "`torch.export` with a dynamic batch, inputs by keyword, large inputs (the fused product)")
def test_export_of_dynamic_shapes() -> None:
    model = vit()
    _, _, expected = tuned(model)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (), {"x": images(8)}, dynamic_shapes={"x": {0: batch}})
    for rows in (3, 48):  # 48 images are more than the fused product's threshold
        close(program.module()(x=images(rows)), expected(images(rows)), 1e-4)


@row("torch", "`torch.export` of a language model and of an open_clip pair (weights read directly)")
@pytest.mark.parametrize("family", ["llama", "open_clip"])
def test_export_of_families(family: str) -> None:
    if family == "llama":
        model = causal()
        _, _, expected = tuned(model)
        program = torch.export.export(_Logits(model), (words(),), strict=False)
        close(program.module()(words()), expected(words()).logits, 1e-4)
        return
    example = FAMILIES[family]()
    before = untouched(example.model)
    tuning = bend(mmpeft.attach(example.model, mmpeft.LoRA(rank=2, at=ALL)))
    program = torch.export.export(example.model, (), example.batch, strict=False)
    got = program.module()(**example.batch)
    close(example.read(got), example(plain(tuning, before)), 1e-4)


BACKEND = "eager"  # the graphs that are captured are what is tested; `test_compile` compiles the backward pass as well
COMPILED = {
    "fullgraph": {"fullgraph": True, "backend": "aot_eager"},
    "dynamic": {"fullgraph": True, "dynamic": True, "backend": BACKEND},
    "default": {"backend": BACKEND},
}


@row("torch", "`torch.compile(fullgraph=True)` forward and backward, switched with `use` between calls")
@pytest.mark.parametrize("options", COMPILED)
def test_compile(options: str) -> None:
    model = vit(depth=1)
    tuning, before, expected = tuned(model)
    compiled = torch.compile(model, **COMPILED[options])
    close(compiled(images()), expected(images()), 1e-4)
    with mmpeft.use(model, None):
        close(compiled(images()), before(images()), 1e-4)
    close(compiled(images()), expected(images()), 1e-4)
    loss = compiled(images()).square().sum()
    loss /= 4
    loss.backward()
    got = {n: p.grad.clone() for n, p in tuning.named_parameters()}
    model.zero_grad()
    (model(images()).square().sum() / 4).backward()
    for name, parameter in tuning.named_parameters():
        close(got[name], parameter.grad, 1e-4)
    tuning.merge()
    with torch.no_grad():
        close(compiled(images()), expected(images()), 1e-4)


@row("torch", "`model.compile()`, regional `block.compile()`, a compiled function around the model")
@pytest.mark.parametrize("way", ["model", "blocks", "function"])
def test_other_ways_to_compile(way: str) -> None:
    model = vit(depth=1)
    tuning, before, expected = tuned(model)
    run: Any = model
    if way == "model":
        model.compile(backend=BACKEND, fullgraph=True)
    elif way == "blocks":
        for block in model.blocks:
            block.compile(backend=BACKEND, fullgraph=True)
    else:
        run = torch.compile(lambda x: model(x).softmax(-1).log(), backend=BACKEND, fullgraph=True)
        inner, expected_run = expected, None
        del expected_run
        close(run(images()), inner(images()).log_softmax(-1), 1e-4)
        with mmpeft.use(model, None):
            close(run(images()), before(images()).log_softmax(-1), 1e-4)
        return
    close(run(images()), expected(images()), 1e-4)
    with mmpeft.use(model, None):
        close(run(images()), before(images()), 1e-4)
    close(run(images()), expected(images()), 1e-4)
    run(images()).sum().backward()
    assert all(p.grad is not None for p in tuning.parameters())
    tuning.detach()
    close(run(images()), before(images()), 1e-4)


@row(
    "torch",
    "compiled and called before `attach`, by `torch.compile`, `model.compile()` and `block.compile()`",
    "the adapter in effect afterwards, the plain answer after detach",
)
@pytest.mark.parametrize("way", ["wrapper", "model", "blocks"])
def test_compiled_before_attach(way: str) -> None:
    model = vit(depth=1)
    before = untouched(model)
    run: Any = model
    if way == "wrapper":
        run = torch.compile(model, backend=BACKEND)
    elif way == "model":
        model.compile(backend=BACKEND)
    else:
        for block in model.blocks:
            block.compile(backend=BACKEND)
    close(run(images()), before(images()), 1e-4)
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL))
    close(run(images()), before(images()), 1e-4)
    bend(tuning)
    expected = plain(tuning, before)
    close(run(images()), expected(images()), 1e-4)
    tuning.detach()
    close(run(images()), before(images()), 1e-4)


@row(
    "torch",
    "`attach` to what `torch.compile` returned (`OptimizedModule`)",
    "refused, with the module to attach to",
)
def test_attach_to_an_optimized_module() -> None:
    model = vit(depth=1)
    before = untouched(model)
    compiled = torch.compile(model, backend=BACKEND)
    with pytest.raises(MMPEFTError, match="_orig_mod"):
        mmpeft.attach(compiled, mmpeft.LoRA(rank=2, at=ALL))
    close(compiled(images()), before(images()), 1e-4)


@row("torch", "`torch.jit.script` of a merged model", "the merged plain model's answers, saved and loaded")
@pytest.mark.parametrize("method", ["LoRA", "BitFit", "Full"])
def test_script_after_merge(method: str, tmp_path: Path) -> None:
    from timm.layers import set_scriptable

    set_scriptable(True)
    try:
        model = vit()
        before = untouched(model)
        torch.jit.script(before)  # the model itself can be scripted
        given = {"rank": 2, "at": ALL} if method == "LoRA" else {}
        tuning = bend(mmpeft.attach(model, getattr(mmpeft, method)(**given)), 0.05)
        with torch.no_grad():
            right = model(images())
        differ(right, before(images()))
        tuning.merge()
        scripted = torch.jit.script(model)
        close(scripted(images()), right, 1e-4)
        torch.jit.save(scripted, str(tmp_path / "model.pt"))
        close(torch.jit.load(str(tmp_path / "model.pt"))(images()), right, 1e-4)
        tuning.unmerge()
        close(model(images()), right, 1e-4)
    finally:
        set_scriptable(False)


@row(
    "torch",
    "`torch.jit.script` of a model that is tuned and not merged",
    "refused: merge first, or trace, export or compile",
)
def test_script_before_merge() -> None:
    model = vit()
    _, _, expected = tuned(model)
    with pytest.raises(MMPEFTError, match="merge"):
        torch.jit.script(model)
    close(model(images()), expected(images()), 1e-4)


@row("torch", "`torch.jit.trace` of a tuned and of a merged model")
@pytest.mark.parametrize("merged", [False, True])
def test_trace(merged: bool, tmp_path: Path) -> None:
    model = vit()
    tuning, _, expected = tuned(model)
    if merged:
        tuning.merge()
    with torch.no_grad():
        traced = torch.jit.trace(model, images())
        close(traced(images(seed=2)), expected(images(seed=2)), 1e-4)
        many = images(64)  # from which on the fused product pays
        torch.jit.save(torch.jit.trace(model, many), str(tmp_path / "model.pt"))
        for x in (many, images(3)):
            close(torch.jit.load(str(tmp_path / "model.pt"))(x), expected(x), 1e-4)


@row("onnxruntime", "`torch.onnx.export` of a merged and of a tuned model, run by onnxruntime, dynamic batch")
@pytest.mark.parametrize("merged", [True, False])
def test_onnx(merged: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = vit()
    tuning, before, expected = tuned(model)
    if merged:
        tuning.merge()
    path = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.onnx.export(model, (images(),), str(path), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for rows in (4, 3):
        (got,) = session.run(None, {session.get_inputs()[0].name: images(rows).numpy()})
        close(torch.from_numpy(got), expected(images(rows)), 1e-4)
    differ(torch.from_numpy(got), before(images(3)))


@row("onnxruntime", "`torch.onnx.export` of a merged language model, run by onnxruntime")
def test_onnx_of_a_language_model(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = causal()
    tuning, _, expected = tuned(model)
    tuning.merge()
    path = tmp_path / "model.onnx"
    torch.onnx.export(_Logits(model).eval(), (words(),), str(path), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: words(seed=1).numpy()})
    close(torch.from_numpy(got), expected(words(seed=1)).logits, 1e-4)


@row("torch", "`torch.fx.symbolic_trace` of a tuned and of a merged model, where the model itself can be traced")
@pytest.mark.parametrize("merged", [False, True])
def test_symbolic_trace(merged: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            self.q = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, gain: float = 2.0) -> torch.Tensor:
            return self.q(self.inner(x)) * gain

    from mmpeft.sites import Site, anatomy, qualified_name

    anatomy(qualified_name(Net))(
        lambda model: [Site("q", "attn.q", 0, kind="linear"), Site("inner.0", "mlp.up", 0, kind="linear")]
    )
    torch.manual_seed(0)
    model = Net()
    before = untouched(model)
    torch.fx.symbolic_trace(before)
    tuning, _, expected = tuned(model)
    if merged:
        tuning.merge()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(3, 8)
    close(traced(x), expected(x))
    assert [n.name for n in traced.graph.nodes if n.op == "placeholder"] == ["x", "gain"]
    close(copy.deepcopy(traced)(x), expected(x))
