"""Notebooks as pages: text as it stands, code as blocks, what they printed and drew below.

`python -m tests.docs.notebooks [NAME ...]` runs them and stores their outputs.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
ORDER = ("classify", "clip_few_shot", "diffusion_style", "peft_and_back", "compare_methods")

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
"""What rich writes for a terminal."""


def pages() -> dict[str, str | bytes]:
    """Path → text, one page a notebook, and the pictures that it shows."""
    found: dict[str, str | bytes] = {}
    for name in ORDER:
        found |= page(name, json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8")))
    return found


def page(name: str, notebook: dict[str, Any]) -> dict[str, str | bytes]:
    """A notebook's page and its pictures."""
    lines: list[str] = []
    pictures: dict[str, str | bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        for output in cell["outputs"]:
            text = "".join(output.get("text") or output.get("data", {}).get("text/plain", "")).strip()
            png = output.get("data", {}).get("image/png")
            if png:
                file = f"{name}_{len(pictures)}.png"
                pictures[f"notebooks/{file}"] = base64.b64decode(png)
                lines += [f"![output of the cell above]({file})", ""]
            elif text:
                lines += ["```text", text, "```", ""]
    note = f"This page is a notebook, `docs/notebooks/{name}.ipynb`: open it in Jupyter to run and change it."
    title, *rest = lines
    first, _, more = title.partition("\n")
    return {f"notebooks/{name}.md": "\n".join([first, "", f"*{note}*", "", more.strip(), *rest]), **pictures}


def run(name: str) -> None:
    """Run a notebook from top to bottom and store what it printed and drew."""
    import nbformat
    from nbclient import NotebookClient

    file = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = list(_kept(cell.outputs))
    nbformat.write(notebook, file)


def _kept(outputs: list[Any]) -> Iterator[Any]:
    """What was printed, as one text where nothing is drawn in between, and pictures."""
    for printed, group in groupby(outputs, key=lambda out: out.get("name") == "stdout"):
        if printed:
            own = list(group)
            own[0]["text"] = COLOURS.sub("", "".join(out["text"] for out in own))
            yield own[0]
        else:
            yield from (out for out in group if "image/png" in out.get("data", {}))


if __name__ == "__main__":
    for each in sys.argv[1:] or ORDER:
        print(each)
        run(each)
