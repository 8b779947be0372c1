"""Two processes on the CPU train what one process trains on the same global batch."""

from __future__ import annotations

import torch

import mmpeft
from mmpeft.run.checkpoint import LastCheckpoint
from tests.tasks.tiny import TinyData, classifier, trainer


def test_two_processes_equal_one(tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # another test's seed_everything would seed the workers alone
    losses, weights, metrics = [], [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        strategy = {"strategy": "ddp_fork", "devices": 2} if processes == 2 else {}
        run = trainer(folder, max_epochs=2, callbacks=[LastCheckpoint()], **strategy)
        module = classifier(mmpeft.LoRA(rank=2), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        run.fit(module, TinyData(batch_size=8 // processes))
        losses.append(run.callback_metrics["train/loss"])
        metrics.append(run.callback_metrics["val/accuracy"])
        weights.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(metrics[1], metrics[0])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-6, rtol=1e-4)
    trainer(tmp_path).test(module, TinyData(), verbose=False)  # the forked workers' weights came back
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in module.state_dict().items())


def test_two_processes_write_one_file(tmp_path):
    run = trainer(tmp_path, strategy="ddp_fork", devices=2)
    run.predict(classifier(), TinyData(batch_size=2), return_predictions=False)
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert len(lines) == 11
    assert {line.split(",")[0] for line in lines[1:]} == {f"image{i}.png" for i in range(10)}
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]
