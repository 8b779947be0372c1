"""Lightning: Fabric, a module of one's own in the Trainer, and the suite's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

import mmpeft
from tests.compat.models import ALL, bend, close, differ, images, near, plain, untouched, vit
from tests.compat.rows import row
from tests.tasks.tiny import TinyData, classifier, trainer


def _fabric(precision: str) -> Any:
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.launch()
    return fabric


@row("lightning", "`Fabric.setup`, `backward`, clipping, save and load: 32-true, bf16-mixed, bf16-true")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fabric(precision: str, tmp_path: Path) -> None:
    fabric = _fabric(precision)
    model = vit()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL)))
    reference = fabric.setup(plain(tuning, before))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    wrapped, optimizer = fabric.setup(model, optimizer)
    got, expected = wrapped(images()), reference(images())
    near(got, expected, 1e-5 if precision == "32-true" else 0.05)
    was = {n: p.detach().clone() for n, p in tuning.named_parameters()}
    loss = wrapped(images()).square().mean()
    loss /= 4
    fabric.backward(loss)
    fabric.clip_gradients(wrapped, optimizer, max_norm=10.0)
    optimizer.step()
    optimizer.zero_grad()
    assert all(not torch.equal(p, was[n]) for n, p in tuning.named_parameters())
    state = {n: t.clone() for n, t in tuning.state_dict().items()}
    fabric.save(tmp_path / "state.ckpt", {"model": wrapped, "optimizer": optimizer})
    bend(tuning)
    fabric.load(tmp_path / "state.ckpt", {"model": wrapped, "optimizer": optimizer})
    assert all(torch.equal(state[n], t) for n, t in tuning.state_dict().items())
    with mmpeft.use(wrapped.module, None), torch.no_grad():
        differ(wrapped(images()).float(), expected.float())


@row(
    "lightning",
    "`attach` to a model that Fabric has set up, `no_backward_sync`, `setup_module` again",
    "the adapter in effect and trained",
)
def test_fabric_before_attach() -> None:
    fabric = _fabric("32-true")
    model = vit()
    before = untouched(model)
    wrapped = fabric.setup(model)
    tuning = bend(mmpeft.attach(wrapped.module, mmpeft.LoRA(rank=2, at=ALL)))
    expected = plain(tuning, before)
    close(wrapped(images()), expected(images()))
    fabric.backward(wrapped(images()).sum())
    assert all(p.grad is not None for p in tuning.parameters())
    tuning.detach()
    close(wrapped(images()), before(images()))


class Own(lightning.LightningModule):
    """A module as its user writes it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.model(batch).square().mean()
        loss /= 2
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("score", self.model(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def _run(folder: Path, **options: Any) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return lightning.Trainer(default_root_dir=folder, max_epochs=1, num_sanity_val_steps=0, **quiet, **options)


@row(
    "lightning",
    "`Trainer.fit`, `validate`, checkpoint and resume of one's own LightningModule around a tuned model",
    "with `Full()` the weights of training the untouched copy itself",
)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_a_module_of_ones_own(options: dict[str, Any], tmp_path: Path) -> None:
    model = vit()
    before = untouched(model)
    tuning = mmpeft.attach(model, mmpeft.Full())
    loader = torch.utils.data.DataLoader(list(images(8)), batch_size=4)
    scores = []
    for one in (before, model):
        module, run = Own(one), _run(tmp_path, enable_checkpointing=False, **options)
        run.fit(module, loader)
        scores.append(run.validate(module, loader, verbose=False)[0]["score"])
    close(scores[1], scores[0])
    tuning.merge()
    for name, parameter in before.named_parameters():
        close(model.get_parameter(name), parameter, 1e-5)


@row("lightning", "the suite's own module in `Trainer`: `predict` at a zero update, bf16-mixed, `barebones`")
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}], ids=str)
def test_the_suites_own_module(options: dict[str, Any], tmp_path: Path) -> None:
    module = classifier()
    data = TinyData()
    trainer(tmp_path, max_steps=0, **options).fit(module, data)
    backbone = module.model
    before = untouched(backbone)
    mmpeft.tunings(before)["default"].detach()
    x = images()
    with torch.no_grad():
        close(backbone.eval()(x), before.eval()(x))
    trainer(tmp_path, **options).fit(module, data)
    with torch.no_grad():
        differ(backbone.eval()(x), before(x))
