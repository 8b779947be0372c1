"""Controllers say *when*, *how much* and *which*: gates, scores and selections, schedules, terms of the loss."""

from mmpeft.controllers.base import Controller, Controllers

__all__ = ["Controller", "Controllers"]
