"""Parts say *how* a site is tuned: modules that own tensors and enter the forward pass."""

from mmpeft.parts.base import Hook, Part, Placement
from mmpeft.parts.branch import Branch
from mmpeft.parts.context import Context
from mmpeft.parts.delta import Delta
from mmpeft.parts.experts import ExpertsDelta, ExpertsRescale
from mmpeft.parts.factors import DiagonalLowRank, Factor, Hadamard, KhatriRao, Kron, LowRank, LowRankKron, NestedLowRank
from mmpeft.parts.mask import Mask
from mmpeft.parts.prefix import GatedPrefix, Prefix
from mmpeft.parts.prompt import Prompt, PromptLayer
from mmpeft.parts.rescale import Rescale
from mmpeft.parts.shared import Shared, View
from mmpeft.parts.sparse import Sparse
from mmpeft.parts.statistics import Statistics

__all__ = [
    "Branch",
    "Context",
    "Delta",
    "DiagonalLowRank",
    "ExpertsDelta",
    "ExpertsRescale",
    "Factor",
    "GatedPrefix",
    "Hadamard",
    "Hook",
    "KhatriRao",
    "Kron",
    "LowRank",
    "LowRankKron",
    "Mask",
    "NestedLowRank",
    "Part",
    "Placement",
    "Prefix",
    "Prompt",
    "PromptLayer",
    "Rescale",
    "Shared",
    "Sparse",
    "Statistics",
    "View",
]
