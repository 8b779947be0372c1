"""The six moments of training that controllers see, the same from Lightning and from a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from mmpeft.errors import AdapterFileError, ConfigError
from mmpeft.types import Facts, StateDict


class Controller:
    """Changes a tuning while it trains; every moment does nothing unless overridden.

    A controller that lets parts rest or work says so in `replans`, and hosts plan anew after each of its moments that
    comes before a forward pass.

    `step` counts optimiser steps from 0, `total` is their number in the whole run. With gradient accumulation
    `before_forward` and `after_backward` come once a micro-batch, the others once a step; gradients are unscaled and
    averaged over processes in `before_step` and still there in `after_step`. No moment waits for the device.
    """

    replans: ClassVar[bool] = False

    def fit_start(self, total: int) -> None:
        """Before the first step, and again when a run is resumed."""

    def before_forward(self, step: int) -> None:
        """Before each micro-batch."""

    def after_backward(self, step: int) -> None:
        """After the backward pass of each micro-batch."""

    def before_step(self, step: int) -> None:
        """Gradients are complete, tensors not yet changed."""

    def after_step(self, step: int) -> None:
        """Tensors have changed, gradients are still there."""

    def fit_end(self) -> None:
        """After the last step."""

    def penalty(self) -> Tensor | None:
        """A term for the loss of each micro-batch, a scalar."""
        return None

    def values(self) -> dict[str, Tensor]:
        """What is worth a curve: the budget, mean gates, …"""
        return {}

    def state_dict(self) -> StateDict:
        """Tensors and plain data that a resumed run needs beyond the trained tensors."""
        return {}

    def load_state_dict(self, state: Facts) -> None:
        """Set what `state_dict` returned."""


class Controllers:
    """All controllers of a tuning, driven together:

    control = tuning.controllers
    control.fit_start(total=len(loader) * epochs)
    for batch in batches:
        control.before_forward()
        loss = task_loss(model, batch) + control.penalty()
        loss.backward()
        control.after_backward()
        control.before_step(); optimizer.step(); control.after_step()
        optimizer.zero_grad()
    control.fit_end()
    """

    def __init__(self, controllers: Sequence[Controller], replan: Callable[[], object] | None = None) -> None:
        self.list, self.step, self.total, self.ended = list(controllers), 0, 0, False
        self.replan = replan if any(controller.replans for controller in self.list) else None

    def __bool__(self) -> bool:
        return bool(self.list)

    def fit_start(self, total: int) -> None:
        """`total` is the number of optimiser steps of the whole run, those before a resumption included."""
        if total <= 0 and self.list:
            raise ConfigError(f"{type(self.list[0]).__name__} needs the number of steps in the run, got {total}")
        self.total, self.ended = total, False
        for controller in self.list:
            controller.fit_start(total)

    def before_forward(self) -> None:
        for controller in self.list:
            controller.before_forward(self.step)
        if self.replan is not None:
            self.replan()

    def after_backward(self) -> None:
        for controller in self.list:
            controller.after_backward(self.step)

    def before_step(self) -> None:
        for controller in self.list:
            controller.before_step(self.step)

    def after_step(self) -> None:
        for controller in self.list:
            controller.after_step(self.step)
        if self.replan is not None:
            self.replan()
        self.step += 1

    def fit_end(self) -> None:
        """Acts once, whoever asks first: what writes the adapter may not wait for the loop."""
        if self.ended or not self.total:
            return
        self.ended = True
        for controller in self.list:
            controller.fit_end()

    def penalty(self) -> Tensor | float:
        """The sum of all terms for the loss; 0 where there is none."""
        return sum(term for controller in self.list if (term := controller.penalty()) is not None)

    def values(self) -> dict[str, Tensor]:
        return {name: value for controller in self.list for name, value in controller.values().items()}

    def state_dict(self) -> StateDict:
        return {"step": self.step, "controllers": [controller.state_dict() for controller in self.list]}

    def load_state_dict(self, state: Facts) -> None:
        """Raises AdapterFileError when the state is that of another method."""
        own = state["controllers"]
        if len(own) != len(self.list):
            raise AdapterFileError(
                f"the checkpoint holds the state of {len(own)} controllers, the method has {len(self.list)}"
            )
        self.step = int(state["step"])
        for controller, values in zip(self.list, own):
            controller.load_state_dict(values)
