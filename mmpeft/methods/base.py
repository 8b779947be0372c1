"""Methods are recipes: frozen dataclasses that place parts on sites, registered once with their metadata."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from functools import wraps
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from mmpeft.controllers.scores import Loss, default_loss
from mmpeft.errors import ConfigError, Refused, SiteError, nearest
from mmpeft.methods.fields import check_fields
from mmpeft.methods.former import FormerContract
from mmpeft.methods.needs import Need, Refusal, lacking
from mmpeft.methods.placed import Placed, Traits

# what recipes ask of a model, by the names that methods of others import from here
from mmpeft.methods.recipe import any_tensor as any_tensor
from mmpeft.methods.recipe import fan as fan
from mmpeft.methods.recipe import first_tensor as first_tensor
from mmpeft.methods.recipe import home_of as home_of
from mmpeft.methods.recipe import identity as identity
from mmpeft.methods.recipe import own_weight as own_weight
from mmpeft.methods.recipe import positive as positive
from mmpeft.methods.recipe import rate as rate
from mmpeft.methods.recipe import tensor_of as tensor_of
from mmpeft.methods.targets import with_targets
from mmpeft.parts.base import Placement
from mmpeft.sites import Kind, Selector, Site
from mmpeft.sites.selector import select

Taxonomy = Literal["additive", "selective", "reparameterized", "hybrid", "efficient"]


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method before it is used; tables and tests are generated from it."""

    name: str
    paper: str
    taxonomy: Taxonomy
    mergeable: bool
    identity: bool
    """Whether the tuned model equals the base bit for bit at initialisation."""
    trains_head: bool = False


METHODS: dict[str, type[Method]] = {}
COMPOSED: dict[str, Callable[..., Method]] = {}
"""What `+` and `where` make of methods; said by `compose`, which builds on this file."""
M = TypeVar("M", bound="type[Method]")


def register(
    paper: str, taxonomy: Taxonomy, *, mergeable: bool, identity: bool = True, trains_head: bool = False
) -> Callable[[M], M]:
    """Register a method class under its own name."""

    def add(cls: M) -> M:
        cls.info = MethodInfo(cls.__name__, paper, taxonomy, mergeable, identity, trains_head)
        METHODS[cls.__name__] = cls
        if any(field.name == "at" for field in fields(cls)):
            cls.__init__ = with_targets(cls.__init__)  # type: ignore[method-assign]  # the dataclass's, with one more word
        return cls

    return add


def list_methods(pattern: str = "*", **metadata: Any) -> list[str]:
    """Names of registered methods, by wildcard (case-insensitive) and metadata.

    >>> import mmpeft
    >>> mmpeft.list_methods("*lora*", mergeable=True)
    ['AdaLoRA', 'DyLoRA', 'LoRA']
    """
    known = {f.name for f in fields(MethodInfo)}
    for key in metadata:
        if key not in known:
            raise ConfigError(f"unknown metadata {key!r}; known: {', '.join(sorted(known))}.{nearest(key, known)}")
    return sorted(
        name
        for name, cls in METHODS.items()
        if fnmatch(name.lower(), pattern.lower()) and all(getattr(cls.info, k) == v for k, v in metadata.items())
    )


@dataclass(frozen=True)
class Method(FormerContract, ABC):
    """A recipe: given a model and its sites, which parts go where."""

    info: ClassVar[MethodInfo] = MethodInfo("", "", "hybrid", mergeable=True, identity=True)
    """What is registered; a class that is not is held to the strictest."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Checks of a class's own come after that of its fields' types, which they may rely on."""
        super().__init_subclass__(**options)
        own = cls.__dict__.get("__post_init__")
        if own is not None:

            @wraps(own)
            def checked(self: Method) -> None:
                check_fields(self)
                own(self)

            cls.__post_init__ = checked  # type: ignore[method-assign]  # dataclass's hook

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs(self) -> tuple[Need, ...]:
        """What a model must have, beyond sites that an `at` selects; a class may give it as a plain attribute."""
        return ()

    def check(self, model: nn.Module, available: list[Site]) -> None:
        """Raise for what the model lacks or has that this method cannot work with, before anything is computed.

        Raises:
            SiteError: it has not what the method needs. Refused: a fact of it stands against the method.
        """
        for need in self.needs:
            need.check(type(self).__name__, available)

    @abstractmethod
    def place(self, model: nn.Module, available: list[Site]) -> Placed | list[Placement]:
        """Build the parts, and all that follows from them. Everything is checked here, before the model is changed.

        A plain list of placements stands for parts that nothing drives and of which everything is left.

        Raises:
            SiteError: nothing to tune. Refused: a selected site cannot take this method.
        """

    @abstractmethod
    def count(self, model: nn.Module, available: list[Site]) -> int:
        """Trainable parameters in closed form, without building anything."""

    @property
    def traits(self) -> Traits:
        """What is so of this method with its options; by default what is registered of its class."""
        return Traits(self.info.mergeable, self.info.identity, self.info.trains_head)

    @property
    def mergeable(self) -> bool:
        return self.traits.mergeable

    @property
    def identity(self) -> bool:
        return self.traits.identity

    @property
    def trains_head(self) -> bool:
        return self.traits.trains_head

    @property
    def sitewise(self) -> bool:
        return self.traits.sitewise

    @property
    def decided(self) -> bool:
        return self.traits.decided

    @property
    def needs_data(self) -> bool:
        return self.traits.needs_data

    def __add__(self, other: Method) -> Method:
        return COMPOSED["+"](self, other) if isinstance(other, Method) else NotImplemented

    def resolve(self, model: nn.Module, data: Iterable[Any] = (), loss: Loss = default_loss) -> Method:
        """The method with everything decided that its data decide; the model is left as it was."""
        return self

    def where(self, at: Selector) -> Method:
        """This method on the sites that also match `at`: `LoRA(at="mlp.*").where("depth>=6")`."""
        return COMPOSED["where"](self, at)


@dataclass(frozen=True)
class Sited(Method):
    """A method with an `at` selector over structural sites."""

    at: Selector = ""
    takes: ClassVar[tuple[Kind, ...]] = ()
    """Kinds of site the method can work on; empty for any."""
    elsewhere: ClassVar[tuple[str, ...]] = ()
    """Where the method goes by default in a model that has none of its paper's sites; the first that matches."""
    refuses: ClassVar[tuple[Refusal, ...]] = ()
    """Facts of the chosen sites that the method cannot work with."""

    def check(self, model: nn.Module, available: list[Site]) -> None:
        self.chosen(available)

    def chosen(self, available: list[Site]) -> list[Site]:
        """The sites of this method in a model; a default selector may match in part, a user's may not.

        Sites of the wrong kind, or refused, are passed over where the default selector also finds better ones.

        Raises:
            SiteError: nothing matches. Refused: a site says why it cannot be tuned, is of the wrong kind, or has what
                the method refuses.
        """
        name = type(self).__name__
        for need in self.needs:
            need.check(name, available)
        default = next(f.default for f in fields(self) if f.name == "at")
        found = self._by_default(available) if self.at == default else self.named(available, every=True)
        for site in found:
            if site.refuse:
                raise Refused(f"{name} at {site}: {site.refuse}")
            if self.takes and site.kind not in self.takes:
                raise Refused(
                    f"{name} works on {' or '.join(self.takes)} sites; at={self.at!r} also selects {site}, "
                    f"which is of kind {site.kind!r}"
                )
        for refusal in self.refuses:
            refusal.check(self, found, available)
        return found

    def _by_default(self, available: list[Site]) -> list[Site]:
        """The usable sites that the default names, or one of its alternatives where the model has none of those."""
        for at in (self.at, *self.elsewhere):
            try:
                found = select(available, at, every=False)
            except SiteError:
                continue
            usable = [site for site in found if not site.refuse and (not self.takes or site.kind in self.takes)]
            if usable or at == self.at:
                return usable or found
        return self.named(available)

    def named(self, available: list[Site], *, every: bool = False) -> list[Site]:
        """The sites that `at` names, whether the method can work on them or not; see `select` for `every`."""
        try:
            return select(available, self.at, every=every)
        except SiteError as error:
            raise lacking(type(self).__name__, f"sites at={self.at!r}", error) from None


WEIGHTS = "{attn.*,cross.*,mlp.*,mixer.*,expert.*,conv,proj}"
PRODUCTS = (f"{WEIGHTS} & depth>=0", WEIGHTS)
"""Every product inside blocks, or in a model without blocks all between its embedding and its head."""


@dataclass(frozen=True)
class SiteMethod(Sited):
    """A method that treats each selected site alone: subclasses give `build` and `count_at` for one site."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, sitewise=True)

    @abstractmethod
    def build(self, model: nn.Module, site: Site) -> Placement:
        """The part for one site."""

    @abstractmethod
    def count_at(self, model: nn.Module, site: Site) -> int:
        """Its parameters in closed form."""

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        return Placed([self.build(model, site) for site in self.chosen(available)])

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return sum(self.count_at(model, site) for site in self.chosen(available))


def with_depth(placements: Sequence[Placement], available: Sequence[Site]) -> list[Placement]:
    """Placements with the depth of the block each stands in; -1 outside every block."""
    blocks = {site.path: site.depth for site in available if site.role in ("block", "tokens")}

    def depth(path: str) -> int:
        while path and path not in blocks:
            path = path.rpartition(".")[0]
        return blocks.get(path, -1)

    return [replace(p, depth=depth(p.hooks[-1].path if p.hooks else p.home)) for p in placements]
