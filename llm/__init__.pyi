"""Types of the names of mmpeft.llm; written by `python -m tests.support.stubs`."""

from mmpeft.llm.inputs import example_inputs as example_inputs
from mmpeft.llm.named import build as build

COMMANDS: dict[str, tuple[str, str]]
DATA: dict[str, str]
TASKS: dict[str, str]
