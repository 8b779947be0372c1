"""`TuningModule`: the LightningModule that every task of every domain extends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mmpeft.errors import AdapterFileError, ConfigError, nearest
from mmpeft.methods import LinearProbe
from mmpeft.methods.base import Method
from mmpeft.recompute import Recompute
from mmpeft.surgery import attach
from mmpeft.training.schedule import warmup_cosine
from mmpeft.tuning import Tuning


class TuningModule(lightning.LightningModule):
    """A backbone, a method and an optimiser; subclasses add the backbone (`build`) and the loss.

    The optimiser sees only what trains. Weight decay is left off vectors (biases, norms, scalings: (IA)³ must
    decay to 1, not to 0). Checkpoints hold only what trains. `train_head` adds the sites of role `head` unless
    the method trains them already.
    """

    def __init__(
        self,
        method: Method,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        recompute: Recompute = None,
        compile: bool = False,
        train_head: bool = True,
    ) -> None:
        """Args:
        warmup: share of all steps with a linear rise of the learning rate; cosine decay to zero follows.
        recompute: what blocks compute again in the backward pass: nothing, `pointwise` operations, or `block`.
        compile: compile every block with torch.compile.
        """
        super().__init__()
        if not 0 <= warmup < 1:
            raise ConfigError(f"warmup is a share of all steps in [0, 1), got {warmup}")
        self.method, self.optimizer, self.warmup = method, optimizer, warmup
        self.recompute, self.compile_blocks, self.train_head = recompute, compile, train_head
        self.model: nn.Module | None = None
        self.tuning: Tuning | None = None

    @abstractmethod
    def build(self) -> nn.Module:
        """Create the backbone, pretrained or not."""

    def prepare(self) -> Tuning:
        """Create the backbone and attach the method once; configuration errors come out here, before any compute."""
        if self.tuning is None:
            self.model = self.build()
            method = self.method
            if self.train_head and not method.trains_head:
                method = method + LinearProbe()
            self.tuning = attach(self.model, method)
            self.tuning.recompute = self.recompute
            if self.compile_blocks:
                for path in self.tuning._state.blocks:
                    self.model.get_submodule(path).compile()
        return self.tuning

    def configure_model(self) -> None:
        self.prepare()

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Everything that trains: the tuning's tensors, and parameters a task adds beside the backbone."""
        tuning = self.prepare()
        held = {id(p) for p in tuning.parameters()}
        yield from ((f"tuning.{name}", p) for name, p in tuning.named_parameters())
        yield from ((n, p) for n, p in self.named_parameters() if p.requires_grad and id(p) not in held)

    def configure_optimizers(self) -> dict[str, Any]:
        tensors = [p for _, p in self.trainable()]
        groups = [
            {"params": [p for p in tensors if p.dim() > 1]},
            {"params": [p for p in tensors if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer: Optimizer = self.optimizer([group for group in groups if group["params"]])
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler: LRScheduler = warmup_cosine(optimizer, steps, self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- checkpoints hold only what trains ------------------------------------------------------------------

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Tensor] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Tensor]:
        found = {} if destination is None else destination
        for name, parameter in self.trainable():
            found[prefix + name] = parameter if keep_vars else parameter.detach()
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Set every trainable tensor.

        Raises:
            AdapterFileError: names or shapes differ from what this method trains.
        """
        own = dict(self.trainable())
        missing, extra = sorted(set(own) - set(state_dict)), sorted(set(state_dict) - set(own))
        if missing or extra:
            raise AdapterFileError(
                f"the checkpoint was written by another method or task: {len(missing)} tensors missing (first: "
                f"{missing[:2]}), {len(extra)} unknown (first: {extra[:2]}).{nearest((extra or [''])[0], missing)}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != state_dict[name].shape:
                    raise AdapterFileError(
                        f"{name}: expected shape {tuple(parameter.shape)}, got {tuple(state_dict[name].shape)}"
                    )
                parameter.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])
