"""Many tunings on one frozen model, with heads, keys and a route for each sample."""

from mmpeft.bank.bank import Bank
from mmpeft.bank.entry import Entry
from mmpeft.bank.heads import Head, LinearHead, PrototypeHead, RidgeHead
from mmpeft.bank.router import Choice

__all__ = ["Bank", "Choice", "Entry", "Head", "LinearHead", "PrototypeHead", "RidgeHead"]
