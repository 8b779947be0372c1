"""`Tuning`: the handle on one method attached to one model, with its files; and the verbs that give one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from torch import nn

from mmpeft.controllers.scores import Loss, default_loss
from mmpeft.errors import ConfigError, renamed
from mmpeft.formats import exchange, merged, native
from mmpeft.hub.adapters import local, push
from mmpeft.hub.card import Card
from mmpeft.methods.base import Method
from mmpeft.methods.selective.linear_probe import LinearProbe
from mmpeft.surgery import attaching
from mmpeft.surgery.attached import Attached
from mmpeft.surgery.merging import check_whole
from mmpeft.surgery.state import state_of
from mmpeft.types import Batch


def attach(
    model: nn.Module,
    method: Method,
    name: str = "default",
    *,
    data: Iterable[Batch] | None = None,
    loss: Loss = default_loss,
    run: bool = True,
    train_head: bool = False,
    example: Batch = None,
) -> Tuning:
    """Tune `model` by `method`: freeze the base and hang trainable parts under it; nothing else changes.

    A method that chooses by data what it trains (a Fisher mask) scores batches of `data` by `loss(model, batch)`
    first, by default the cross entropy of `(inputs, labels)` or the model's own loss of keyword arguments.

    `train_head` also trains the sites of role `head`, unless the method does: `method + LinearProbe()`. A head that
    looks as if nobody had trained it and that stays frozen gets a FreshHeadWarning.

    The model stays the same object, `isinstance` still holds and no state-dict key is renamed. Several
    tunings may live on one model under different names; the newest one is in use, unless `run` is False. While other
    threads run the model, `attach` waits for their passes.

    `example` (a tensor, a tuple of arguments or a mapping of keyword arguments) says what a model takes whose library
    the suite does not know: its sites are found by watching a pass. It also proves that a pass comes by the parts.
    `tuning.liveness(batch)` proves that each of them learns.

    After any exception, an interrupt included, the model is bit for bit what it was.

    Raises:
        SiteError: nothing is known of the model's inputs, a selector matches nothing, or the example's pass goes past
            parts.
        Refused: the method cannot work on a selected site, or the model is sharded already; the message has the reason.
        ConfigError: the name is taken or no identifier, or the argument is no method.
    """
    if not isinstance(method, Method):
        raise ConfigError(
            f"attach expects a method such as mmpeft.LoRA(rank=8), got {type(method).__name__}: {method!r}"
        )
    if train_head and not method.trains_head:
        method = method + LinearProbe()
    attaching.attach(model, method, name, data=data, loss=loss, run=run, example=example, fresh=True)
    return Tuning(model, name)


def load(
    model: nn.Module, folder: str | Path, name: str = "default", *, check_base: bool = True, run: bool = True
) -> Tuning:
    """Attach the method of an adapter folder to a model and set its tensors.

    `folder` may be a repository of the Hugging Face hub: `user/repository`, `user/repository@revision`.
    `check_base=False` accepts a base with other weights; shapes must agree all the same. With `run=False`, what is in
    use stays so.

    Raises:
        AdapterFileError: not an adapter folder of this suite, partial, tampered with, pickled, not finite, or
            made for another base. The model is left as it was.
    """
    if isinstance(model, str | Path):
        raise ConfigError(f"the base comes first: mmpeft.load(model, {str(model)!r})")
    return Tuning(model, native.load(model, local(folder), name, check_base=check_base, run=run).name)


def load_foreign(
    model: nn.Module, path: str | Path, name: str = "default", component: str = "", *, strict: bool = False
) -> Tuning:
    """Attach an adapter of any known format to a model; the suite's own folders too.

    `component` chooses the layers of one model where a file holds those of a whole pipeline (`unet`,
    `text_encoder`). Keys of no known kind are left out with a warning, or with `strict` are an error.

    Raises:
        AdapterFileError: unreadable, or not for this model. The model is left as it was.
    """
    return Tuning(model, exchange.load_foreign(model, path, name, component, strict=strict).name)


def tunings(model: nn.Module) -> dict[str, Tuning]:
    """Every tuning of a model, by name; also for a copy or an unpickled model."""
    state = state_of(model)
    return {name: Tuning(model, name) for name in state.placements} if state else {}


class Tuning(Attached):
    """One method attached to one model under a name.

    Holds no state of its own: everything lives on the model, so copies and pickles of the model carry it.
    """

    def save(self, folder: str | Path, *, inference: bool = False, bake: bool | None = None) -> Path:
        """Write `adapter.safetensors` and `adapter.json`, atomically.

        With `inference`, what `for_inference()` would leave; `bake` is its deprecated name.
        """
        if bake is not None:
            renamed("tuning.save(bake=…)", "inference")
        check_whole(self)
        return native.save(self, folder, inference=inference or bool(bake))

    def export(
        self,
        path: str | Path,
        format: Literal["peft", "diffusers", "kohya", "comfy", "mlx", "adapterhub"] = "peft",
        *,
        verify: bool = True,
        encoders: int = 0,
        dora: Literal["", "comfy", "difference", "low_rank"] = "",
        rank: int = 0,
    ) -> exchange.Exported:
        """Write the tuning as other tools read it, and prove it: reloaded by its consumer, compared layer by layer.

        `encoders` is how many text encoders the pipeline has, where this is one: kohya's files name it by that. `dora`
        writes DoRA for readers that take it otherwise: with ComfyUI's lengths, as full differences, or as LoRA of
        `rank`.

        Raises:
            Refused: a part that the format cannot hold. AdapterFileError: a reader finds something else.
        """
        check_whole(self)
        return exchange.export(self, path, format, verify=verify, encoders=encoders, dora=dora, rank=rank)

    def push_to_hub(
        self,
        repository: str,
        *,
        base_model: str = "",
        data: str = "",
        scores: Mapping[str, float] = {},
        license: str = "",
        private: bool = False,
    ) -> str:
        """Upload the adapter with a model card, and its PEFT folder where PEFT has the method; return the address.

        Args:
            repository: `user/repository`; it is made where it is not there.
            base_model: name of the base, on the hub or in its library, for the card.
            data: what it was trained on, for the card.
            scores: metrics by name, for the card.
            license: of the adapter, for the card.
            private: whether a new repository is private.

        Raises:
            ConfigError: no such name, no right to write there, or no network.
        """
        check_whole(self)
        return push(self, repository, Card.of(self, base_model, data, scores, license), private)

    def save_merged(self, path: str | Path) -> merged.Merged:
        """Write the whole model with the tuning merged in, as its own library reads it; the model here stays as it is.

        Raises:
            Refused: a part cannot be merged, or the library's model has no place for a tensor that merging creates.
        """
        return merged.save_merged(self, path)
