"""What is recorded of one pass of a model: operations, runs of modules, and the functions attentions are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mmpeft.types import Args, Kwargs, TorchOp

PRODUCTS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "_grouped_mm", "embedding", "addmv", "mv"}
)
SOFTMAX = frozenset({"_softmax", "softmax", "_safe_softmax"})
POOLS = frozenset({"avg_pool2d", "avg_pool3d", "_fft_c2c", "_fft_r2c"})
"""What mixes positions without a weight."""
VIEWS = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "view_as", "flatten", "unflatten"})
VIEWS |= {"t", "transpose", "permute", "expand", "squeeze", "unsqueeze", "alias", "detach", "lift_fresh"}
VIEWS |= {"clone", "contiguous", "_to_copy", "to", "copy"}
"""What changes the shape, the layout or the type of a tensor and none of its values."""
SLICES = frozenset({"slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow", "as_strided"})
PICKS = frozenset({"index", "index_select"})
"""What takes entries of a tensor by numbers that were computed."""
BLANKS = frozenset(
    {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}
)
"""What takes the shape of a tensor and none of its values."""
SWAPS = frozenset({"t", "transpose", "permute"})


@dataclass(frozen=True)
class Use:
    """How a product reads a parameter: its name, whether stored [in, out], and from which entry of its storage on."""

    name: str
    transposed: bool = False
    derived: bool = False
    """Computed from the parameter by more than views: standardised, normalised, looked up."""
    offset: int = 0
    shape: tuple[int, ...] = ()
    """Of what the product reads."""
    stacked: bool = False
    """One matrix of many, or all of them: the parameter has three dimensions."""
    left: bool = False
    """Multiplied from the left, so that the channels of the result are its second to last dimension."""


@dataclass
class Op:
    """One operation: what it read (as operations), where it ran, and what it made."""

    index: int
    name: str
    func: TorchOp | None
    """None of what is given: inputs, and tensors that the model holds."""
    args: Args
    kwargs: Kwargs
    inputs: list[int]
    call: int
    """The innermost module call that was running."""
    shape: tuple[int, ...]
    static: bool
    """Whether it depends on parameters and constants alone."""
    weight: Use | None = None
    """Of a product: the parameter in it."""
    held: int = -1
    """Of a product: the operation whose result that is."""
    outs: list[int] = field(default_factory=list)
    """Identities of the tensors it made."""
    label: str = ""
    """Of an input, the name of its argument; of a parameter, its own."""
    is_floating: bool = True

    @property
    def channel(self) -> int:
        """Where a product has its channels."""
        return 1 if self.name == "convolution" else -2 if self.weight and self.weight.left else -1


@dataclass
class Call:
    """One run of one module, and the operations in it: `first <= index < last`."""

    index: int
    path: str
    parent: int
    first: int
    last: int = -1
    reads: list[int] = field(default_factory=list)
    """Operations whose results it was given."""
    given: list[tuple[int, ...]] = field(default_factory=list)
    """Their shapes."""
    gives: list[int] = field(default_factory=list)
    """Operations whose results it returned, in order."""
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    """Of what it returned."""


@dataclass(frozen=True)
class Function:
    """A call of a torch function that an attention may be made of: `first <= index < last`."""

    name: str
    first: int
    last: int
    shapes: list[tuple[int, ...]]
    """Of the tensors that it was given."""


@dataclass
class Record:
    """What was seen of one pass."""

    ops: list[Op]
    calls: list[Call]
    functions: list[Function]
    outputs: list[int]
    """Operations whose results the model returned."""
    alive: list[object]
    """Tensors are known by identity, which is unique while they live."""
    real: bool = False
    """Whether it ran on a real batch, of which some parts of the model may rest."""


def looks(name: str, args: Args) -> bool:
    """Whether an operation on a stack gives its matrices: views, or entries along the first dimension."""
    if name == "index":
        return args[1][0] is not None and not any(isinstance(index, Tensor) for index in args[1][1:])
    return name in VIEWS or (name == "index_select" and args[1] == 0)


RESHAPES = frozenset({"view", "_unsafe_view", "reshape"})
"""Views that may join the matrices of a stack."""


def swaps(name: str, shape: tuple[int, ...], args: Args, stacked: bool) -> bool:
    """Whether a change of the order of dimensions swaps those of a matrix: the last two of a stack, else the long ones.

    What has other than two long dimensions is taken to be swapped by any.
    """
    dims = len(shape)
    order = list(range(dims))
    if name == "permute":
        order = [d % dims for d in args[1]]
    elif name == "transpose":
        one, other = (d % dims for d in args[1:3])
        order[one], order[other] = order[other], order[one]
    else:
        order.reverse()
    pair = [dims - 2, dims - 1] if stacked else [d for d in range(dims) if shape[d] > 1]
    return len(pair) != 2 or order.index(pair[0]) > order.index(pair[1])
