"""`TuningModule`: the LightningModule that every task of every domain extends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import lightning
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from mmpeft.controllers.scores import default_loss
from mmpeft.data.contract import expected
from mmpeft.data.options import inherit_options
from mmpeft.errors import CheckpointError, ConfigError, SiteError, nearest
from mmpeft.hosting.recompute import Recompute
from mmpeft.methods import LinearProbe
from mmpeft.methods.base import Method
from mmpeft.methods.spec import from_spec
from mmpeft.sites import Site, sites
from mmpeft.tasks.checkpoint import AtomicCheckpointIO
from mmpeft.tasks.control import METHOD, Control
from mmpeft.tasks.diverged import StopsDiverged
from mmpeft.tasks.frozen import drop_frozen, frozen_towers, lend_frozen
from mmpeft.tasks.half import warn_of_half
from mmpeft.tasks.meaning import check_meaning
from mmpeft.tasks.metrics import FreshMetrics
from mmpeft.tasks.schedule import warmup_cosine
from mmpeft.tuning import Tuning, attach
from mmpeft.types import Argument, Batch, Facts, Kwargs, StateDict, Untyped

D = TypeVar("D")


class TuningModule(lightning.LightningModule):
    """A backbone, a method and an optimiser; a task adds the backbone (`build`) and the loss of a batch (`loss`).

    What a task has beside the backbone it makes in `start`, once the method is attached. Towers in which nothing
    trains stay in evaluation mode. The optimiser sees only what trains. Weight decay is left off vectors (biases,
    norms, scalings: (IA)³ must decay to 1, not to 0). Checkpoints hold only what trains, and loading one is strict.
    `train_head` adds the sites of role `head` unless the method trains them already.
    """

    output: Path | None = None
    """Where predictions go; None for the run's folder."""

    monitor: ClassVar[tuple[str, str] | None] = None
    """The validation metric by which `best.ckpt` is chosen, and whether the best is the `max` or the `min`."""

    resave_after_fit = False
    """Whether the task has chosen something after the last step, so that checkpoints are to be written again."""

    def __init_subclass__(cls, **options: Argument) -> None:
        super().__init_subclass__(**options)
        inherit_options(cls)

    def __init__(
        self,
        method: Method | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        recompute: Recompute = None,
        compile: bool = False,
        train_head: bool = True,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        """
        Args:
            method: what is trained and how; the command line fills it from the key `method`.
            optimizer: any torch optimiser, given everything that trains.
            warmup: share of all steps with a linear rise of the learning rate; cosine decay to zero follows.
            recompute: what blocks compute again in the backward pass: nothing, `pointwise` operations, or `block`.
            compile: compile every block with torch.compile.
            train_head: also train the task head.
            lr_scheduler: a scheduler in place of warm-up and cosine, stepped after each optimiser step.
        """
        super().__init__()
        if not isinstance(method, Method):
            raise ConfigError(
                f"{type(self).__name__} expects a method such as mmpeft.LoRA(rank=8), got {method!r}; on the command "
                "line: --method LoRA, or -c method/lora"
            )
        if not 0 <= warmup < 1:
            raise ConfigError(f"warmup is a share of all steps in [0, 1), got {warmup}")
        self.method, self.optimizer, self.warmup, self.lr_scheduler = method, optimizer, warmup, lr_scheduler
        self.recompute, self.compile_blocks, self.train_head = recompute, compile, train_head
        self.model: nn.Module | None = None
        self.tuning: Tuning | None = None
        self._waiting: Facts | None = None
        self._frozen_towers: list[nn.Module] = []
        self.register_state_dict_post_hook(drop_frozen)
        self.register_load_state_dict_pre_hook(lend_frozen)

    @abstractmethod
    def build(self) -> nn.Module:
        """Create the backbone, pretrained or not. The trainer and its data module are known by now."""

    def start(self) -> None:
        """Make what the task has beside `model` and `tuning`, which are there; a checkpoint is restored after it."""

    @abstractmethod
    def loss(self, batch: Batch, index: int) -> Tensor:
        """The task's loss on a training batch, a scalar."""

    def meaning(self) -> Facts:
        """What outputs stand for, by name, as plain data: `{"classes": ["cat", "dog"]}`.

        It is kept in checkpoints; one of another meaning is refused.
        """
        return {}

    @property
    def datamodule(self) -> Any:
        """The trainer's data module; None without a trainer, or for bare loaders."""
        return getattr(self._trainer, "datamodule", None)

    def data(self, contract: type[D]) -> D | None:
        """The data module, as what a task needs of it; None where the task is given no data module.

        Raises:
            ConfigError: the data module lacks what the contract names.
        """
        found: D | None = self.datamodule
        if found is not None:
            expected(found, contract, type(self).__name__)
        return found

    def asked_texts(self) -> list[str]:
        """Texts that were given with what is to be predicted: `mmpeft predict RUN PATH… --text a b`."""
        inputs = getattr(self.datamodule, "inputs", None)
        return list(inputs.texts) if inputs is not None else []

    def training_step(self, batch: Batch, index: int) -> Tensor | None:
        """The task's loss and the terms that the method's controllers add; None where nothing trains."""
        loss = self.loss(batch, index)
        if not loss.requires_grad and not any(p.requires_grad for p in self.parameters()):
            return None
        penalty = self.prepare().controllers.penalty()
        if not isinstance(penalty, Tensor):
            return loss
        self.log("train/penalty", penalty.detach())
        return loss + penalty

    def scoring_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss by whose gradients a method chooses what trains; by default that of `(inputs, labels)`."""
        return default_loss(model, batch)

    def configure_callbacks(self) -> list[Callback]:
        """Lightning's hook: what a task brings along; a task that brings more adds to it."""
        return [Control(), FreshMetrics(), StopsDiverged()]

    def prepare(self) -> Tuning:
        """Create the backbone and attach the method once; configuration errors come out here, before any compute."""
        if self.tuning is None:
            model = self.build()
            method: Method = self.method
            if self.train_head and not method.trains_head:
                method = method + LinearProbe()
            blocks = [site for site in self._sites(model) if site.role == "block"]
            tuning = attach(model, self._resolved(model, method))
            tuning.recompute = self.recompute
            if self.compile_blocks:
                for block in blocks:
                    model.get_submodule(block.path).compile()
            self.model, self.tuning = model, tuning
            self._frozen_towers = frozen_towers(model, blocks, {placed.home for placed in tuning.placements})
            self.train(self.training)  # before start, which may keep features of a frozen tower
            self.start()
            if self._waiting is not None:
                waiting, self._waiting = self._waiting, None
                self.load_state_dict(waiting)
        return self.tuning

    def train(self, mode: bool = True) -> Self:
        """PyTorch's switch; a tower in which nothing trains stays in evaluation mode."""
        super().train(mode)
        for tower in self._frozen_towers if mode else ():
            tower.eval()
        return self

    def example(self) -> Batch:
        """A batch that the backbone takes, asked for where its library is not known; None for none.

        By default what a training batch of the data module begins with.
        """
        if self.datamodule is None:
            return None
        batch = next(iter(self.datamodule.train_dataloader()))
        return batch[0] if isinstance(batch, tuple | list) else batch

    def _sites(self, model: nn.Module) -> list[Site]:
        """The model's sites, which are found once; by watching an example where nothing is known of its inputs."""
        try:
            return sites(model)
        except SiteError:
            example = self.example()
            if example is None:
                raise
            return sites(model, example)

    def _resolved(self, model: nn.Module, method: Method) -> Method:
        """The method with all chosen that data choose: by the checkpoint that is resumed, or by scoring now."""
        if method.decided:
            return method
        path = self._trainer and self._trainer.ckpt_path
        kept = AtomicCheckpointIO().load_checkpoint(path).get(METHOD) if path else None
        if kept:
            return from_spec(kept)
        if not method.needs_data:
            return method.resolve(model)
        data = self.datamodule
        if data is None or self._trainer is None:
            raise ConfigError(f"{method} chooses by data what trains; fit with a data module, or load a checkpoint")
        device = self._trainer.strategy.root_device
        batches = OnDevice(data.train_dataloader(), device)
        return method.resolve(model.to(device), batches, self.scoring_loss)

    def configure_model(self) -> None:
        """Lightning's hook, called before a checkpoint is restored and before any batch."""
        self.prepare()

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything that trains: the tuning's tensors, and parameters a task adds beside the backbone."""
        self.prepare()
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        tensors = [p for _, p in self.trainable()]
        if not tensors:  # zero-shot, or what is solved without gradients
            return None
        warn_of_half(self, self._trainer)
        groups: list[Kwargs] = [
            {"params": [p for p in tensors if p.dim() > 1]},
            {"params": [p for p in tensors if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = self.optimizer([group for group in groups if group["params"]])
        if self.lr_scheduler is None:
            scheduler: Any = warmup_cosine(optimizer, self._steps(), self.warmup)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        scheduler = self.lr_scheduler(optimizer)
        plan: LRSchedulerConfigType = {"scheduler": scheduler, "interval": "step"}
        if hasattr(scheduler, "monitor"):  # reduce on plateau: looks at a metric once an epoch
            plan |= {"interval": "epoch", "monitor": scheduler.monitor}
        return {"optimizer": optimizer, "lr_scheduler": plan}

    def _steps(self) -> int:
        """Optimiser steps of the whole run.

        Counting them makes Lightning set up the training loader before the checkpoint is read, and its position in
        the epoch is restored only while it is set up: so it is dropped again, to be set up when training starts.
        """
        loop = self.trainer.fit_loop
        known = loop._combined_loader is not None
        steps = int(self.trainer.estimated_stepping_batches)
        if not known:
            loop._combined_loader = None
        return steps

    # -- checkpoints hold only what trains, and what the outputs mean ------------------------------------------

    def on_save_checkpoint(self, checkpoint: StateDict) -> None:
        checkpoint.update(self.meaning())

    def on_load_checkpoint(self, checkpoint: StateDict) -> None:
        """Lightning's hook.

        Raises:
            DataError: the outputs of the checkpoint stand for something else than those of this run.
        """
        check_meaning(checkpoint, self.meaning())

    def load_state_dict(self, state_dict: Facts, strict: bool = True, assign: bool = False) -> _IncompatibleKeys:
        """Set every trainable tensor; nothing is changed unless all names and shapes agree.

        Before the backbone exists (a main process whose forked workers have trained), the tensors wait for it.

        Raises:
            CheckpointError: names or shapes differ from what this method trains.
        """
        if self.tuning is None:
            self._waiting = state_dict
            return _IncompatibleKeys([], [])
        own: dict[str, Tensor] = self.state_dict()
        missing, extra = sorted(set(own) - set(state_dict)), sorted(set(state_dict) - set(own))
        if strict and (missing or extra):
            raise CheckpointError(
                f"the checkpoint was written by another method or task than {self.method}: {len(missing)} tensors "
                f"missing (first: {missing[:2]}), {len(extra)} unknown (first: {extra[:2]})."
                f"{nearest((extra or [''])[0], missing)}"
            )
        for name in set(own) & set(state_dict):
            if own[name].shape != state_dict[name].shape:
                raise CheckpointError(
                    f"{name}: expected shape {tuple(own[name].shape)}, got {tuple(state_dict[name].shape)}; the "
                    "checkpoint was written with other settings of the method, or for another number of classes"
                )
        super().load_state_dict(state_dict, strict=strict, assign=assign)
        return _IncompatibleKeys(missing, extra)


class OnDevice:
    """Batches on another device."""

    def __init__(self, loader: Untyped, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[Batch]:
        return (move_data_to_device(batch, self.device) for batch in self.loader)

    def __len__(self) -> int:
        return len(self.loader)
