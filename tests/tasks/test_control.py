"""Controllers: the six moments, budgets that end exactly, resumed runs, what the saved adapter holds."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import mmpeft
from mmpeft.controllers import Controller, Controllers
from mmpeft.controllers.schedule import cubic, linear
from mmpeft.errors import AdapterFileError, ConfigError
from mmpeft.run.callbacks import Outcome
from mmpeft.run.checkpoint import LastCheckpoint, RandomState
from tests.tasks.tiny import TinyData, classifier, trainer, weights

ADALORA = mmpeft.AdaLoRA(rank=4, target=2, alpha=4.0, every=1, at="attn.*")


class Diary(Controller):
    """Writes down what it sees."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def fit_start(self, total: int) -> None:
        self.seen.append(f"start {total}")

    def before_forward(self, step: int) -> None:
        self.seen.append(f"f{step}")

    def after_backward(self, step: int) -> None:
        self.seen.append(f"b{step}")

    def before_step(self, step: int) -> None:
        self.seen.append(f"<{step}")

    def after_step(self, step: int) -> None:
        self.seen.append(f">{step}")

    def fit_end(self) -> None:
        self.seen.append("end")

    def penalty(self) -> torch.Tensor:
        return torch.tensor(100.0)


def plain_loop(control: Controllers, steps: int, micro: int) -> None:
    control.fit_start(steps)
    for _ in range(steps):
        for _ in range(micro):
            control.before_forward()
            control.after_backward()
        control.before_step()
        control.after_step()
    control.fit_end()


def test_lightning_and_a_plain_loop_call_the_same_moments(tmp_path) -> None:
    diary, reference = Diary(), Diary()
    module = classifier()
    module.prepare = prepare(module, diary)  # type: ignore[method-assign]
    trainer(tmp_path, accumulate_grad_batches=2).fit(module, TinyData(samples=32, batch_size=8))
    plain_loop(Controllers([reference]), steps=2, micro=2)
    assert diary.seen == reference.seen
    assert module.trainer.logged_metrics["train/penalty"] == 100.0


def prepare(module, diary: Diary):
    original = type(module).prepare

    def prepared():
        tuning = original(module)
        if not tuning.controllers.list:
            tuning.controllers.list.append(diary)
        return tuning

    return prepared


def live(tuning: mmpeft.Tuning) -> int:
    return sum(int((p.part.factor.g != 0).sum()) for p in tuning.placements if hasattr(p.part, "factor"))


def test_adalora_ends_at_its_target_and_saves_a_lora(tmp_path) -> None:
    module = classifier(ADALORA)
    run = trainer(tmp_path, max_epochs=3, callbacks=[Outcome()])
    run.fit(module, TinyData())
    sites = sum(hasattr(p.part, "factor") for p in module.tuning.placements)
    assert live(module.tuning) == 2 * sites
    manifest = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    method = manifest["method"]["methods"][0]
    assert method["name"] == "LoRA"
    assert sum(method["rank_pattern"].values()) == 2 * sites
    images = torch.randn(3, 3, 32, 32)
    model = classifier(ADALORA, num_classes=4).build()
    loaded = mmpeft.load(model, tmp_path / "adapter")
    module.eval(), model.eval()
    torch.testing.assert_close(model(images), module(images))
    module.tuning.for_inference()
    torch.testing.assert_close(module(images), model(images))
    assert sum(p.numel() for p in module.tuning.parameters()) == sum(p.numel() for p in loaded.parameters())


@pytest.mark.parametrize(
    "method",
    [
        ADALORA,
        mmpeft.SoRA(rank=4),
        mmpeft.DyLoRA(rank=4),
        mmpeft.ChildTuningF(),
        mmpeft.FishMask(samples=8),
        mmpeft.DiffPruning(density=0.01, until=0.5),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(method, tmp_path) -> None:
    def fit(folder, epochs: int, path: str | None = None):
        module = classifier(method)
        callbacks = [RandomState(), LastCheckpoint(dirpath=tmp_path / folder), StopAfter(epochs)]
        run = trainer(tmp_path / folder, max_epochs=3, callbacks=callbacks)
        torch.manual_seed(7)
        run.fit(module, TinyData(), ckpt_path=path)
        return module

    whole = weights(fit("whole", 3))
    fit("first", 1)
    resumed = weights(fit("first", 3, str(tmp_path / "first" / "last.ckpt")))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


class StopAfter(Callback):
    """Ends a run early, its schedule being that of the whole."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True


def test_every_rank_of_dylora_is_a_lora() -> None:
    module = classifier(mmpeft.DyLoRA(rank=4, at="attn.*"), num_classes=4)
    tuning = module.prepare()
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.normal_(std=0.1)
    images = torch.randn(2, 3, 32, 32)
    module.eval()
    whole = module(images)
    mmpeft.at_rank(tuning.placements, 2)
    cut = module(images)
    assert not torch.allclose(cut, whole)
    tuning.for_inference()
    torch.testing.assert_close(module(images), cut)
    assert "rank=2" in str(tuning.method)
    with pytest.raises(ConfigError, match="expected a DyLoRA"):
        mmpeft.at_rank(tuning.placements, 2)


def test_sora_prunes_what_its_threshold_closes() -> None:
    module = classifier(mmpeft.SoRA(rank=8, threshold=0.5), num_classes=4)
    tuning = module.prepare()
    plain_loop(tuning.controllers, steps=2, micro=1)
    before = live(tuning)
    assert 0 < before < 8 * sum(hasattr(p.part, "factor") for p in tuning.placements)
    images = torch.randn(2, 3, 32, 32)
    module.eval()
    y = module(images)
    tuning.for_inference()
    torch.testing.assert_close(module(images), y)
    assert sum(len(p.part.factor.A) for p in tuning.placements if hasattr(p.part, "factor")) == before


def test_schedules_and_bad_input() -> None:
    assert [cubic(s, 10, 2, 2, 6) for s in (0, 2, 4, 6, 9)] == [10, 10, 3, 2, 2]
    assert linear(3, 0.0, 1.0, 0, 6) == 0.5
    with pytest.raises(ConfigError, match="target=9 is above rank=8"):
        mmpeft.AdaLoRA(rank=8, target=9)
    with pytest.raises(ConfigError, match="no steps to prune in"):
        mmpeft.AdaLoRA(warmup=0.6, settle=0.5)
    with pytest.raises(ConfigError, match="number of steps"):
        Controllers([Diary()]).fit_start(0)
    with pytest.raises(AdapterFileError, match="0 controllers, the method has 1"):
        Controllers([Diary()]).load_state_dict(Controllers([]).state_dict())
