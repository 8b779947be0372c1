"""What any method must keep on any model, for your own of both: `mmpeft.testing.check(model, batch, method)`."""

from mmpeft.testing.checking import Report, check, check_refusal
from mmpeft.testing.invariants import INVARIANTS, Invariant
from mmpeft.testing.session import InvariantError, NotApplicable, Session, first_tensor

__all__ = [
    "INVARIANTS",
    "Invariant",
    "InvariantError",
    "NotApplicable",
    "Report",
    "Session",
    "check",
    "check_refusal",
    "first_tensor",
]
