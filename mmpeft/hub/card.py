"""Model cards: what an adapter is, what it was tuned on and gave, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from mmpeft.errors import shown
from mmpeft.methods.base import Method
from mmpeft.surgery.attached import Attached
from mmpeft.surgery.report import Report


@dataclass(frozen=True)
class Card:
    """What a card tells of an adapter."""

    method_name: str
    method: str
    papers: tuple[str, ...]
    base_class: str
    report: Report
    base_model: str = ""
    """Name of the base on the hub, or in its library."""
    data: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    license: str = ""

    @classmethod
    def of(
        cls, tuning: Attached, base_model: str = "", data: str = "", scores: Mapping[str, float] = {}, license: str = ""
    ) -> Card:
        """The card of a tuning; what it was trained on and what it gave is for the user to say."""
        report = tuning.report()
        base = type(tuning.model).__name__.removeprefix("Tuned")
        members = _members(tuning.method)
        name = " + ".join(type(member).__name__ for member in members)
        papers = tuple(dict.fromkeys(member.info.paper for member in members if hasattr(member, "info")))
        return cls(
            name, " + ".join(map(spelled, members)), papers, base, report, base_model, data, dict(scores), license
        )

    def text(self, repository: str, peft: str | None = None) -> str:
        """The card as Markdown with its header.

        Args:
            repository: where it will be.
            peft: folder in it that PEFT reads, if there is one.
        """
        base = self.base_model or self.base_class
        lines = [*self._header(), f"# {repository.rpartition('/')[2]}", ""]
        lines += [f"{self.method_name} for `{base}`, tuned with mmpeft (`pip install mmpeft`).", ""]
        report = self.report
        rows = {
            "base": f"`{base}` ({self.base_class})",
            "method": f"`{self.method}`",
            "paper": ", ".join(self.papers),
            "trained": f"{report.trainable:,} of {report.total:,} parameters ({report.share:.3%})",
            "where": ", ".join(f"{row.role} ×{row.sites}" for row in report.rows),
            "data": self.data,
        }
        lines += ["| | |", "|---|---|"]
        lines += [f"| {name} | {shown(value).replace('|', chr(92) + '|')} |" for name, value in rows.items() if value]
        if self.scores:
            lines += ["", "## Scores", "", "| metric | value |", "|---|---|"]
            lines += [f"| {name} | {value:.4f} |" for name, value in self.scores.items()]
        lines += ["", "## Load it", "", "```python", "import mmpeft", ""]
        lines += [f"model = ...  # {base}, with the weights it was tuned on: others are refused"]
        lines += [f'tuning = mmpeft.load(model, "{repository}")', "```"]
        if peft:
            lines += ["", "In PEFT:", "", "```python", "from peft import PeftModel", ""]
            lines += [f'model = PeftModel.from_pretrained(model, "{repository}", subfolder="{peft}")', "```"]
        return "\n".join([*lines, ""])

    def _header(self) -> list[str]:
        facts = {"library_name": "mmpeft", "base_model": self.base_model, "license": self.license}
        lines = [f"{name}: {value}" for name, value in facts.items() if value]
        tags = ["mmpeft", "parameter-efficient-fine-tuning", *self.method_name.lower().split(" + ")]
        return ["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""]


def _members(method: Method) -> list[Method]:
    members = getattr(method, "methods", None)
    return [one for member in members for one in _members(member)] if members else [method]


def spelled(method: Method) -> str:
    """A method as one would write it: `LoRA(rank=4)`, without the fields that have their defaults."""
    given = []
    for one in fields(method):
        value = getattr(method, one.name)
        default = one.default_factory() if callable(one.default_factory) else one.default
        if one.init and value != default:
            given.append(f"{one.name}={value!r}")
    return f"{type(method).__name__}({', '.join(given)})"
