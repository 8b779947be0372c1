"""mypy over the suite as it is installed, the domains inside `mmpeft/`: `python -m tests.support.typed [option ...]`.

In the repository the domains lie beside `mmpeft/`, where mypy does not find them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOMAINS = ("vision", "vla", "diffusion", "llm")


def tree() -> Path:
    """A folder that holds the package as an installation does, by links."""
    folder = ROOT / "build" / "typed"
    (folder / "mmpeft").mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (ROOT / "mmpeft").iterdir() if path.name != "__pycache__"}
    wanted |= {name: ROOT / name for name in DOMAINS}
    for link in (folder / "mmpeft").iterdir():
        if link.name not in wanted:
            link.unlink()
    for name, path in wanted.items():
        link = folder / "mmpeft" / name
        if not link.is_symlink():
            link.symlink_to(path)
    return folder


def check(arguments: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run mypy there: on the whole package unless the arguments name files."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "typed"), *arguments]
    return subprocess.run(command, cwd=tree(), capture_output=True, text=True)


if __name__ == "__main__":
    found = check(sys.argv[1:])
    print(found.stdout + found.stderr, end="")
    sys.exit(found.returncode)
