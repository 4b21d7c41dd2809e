"""Where `headway` begins: first of all, whether the packages beside this one are Headway's.

Owns that check: names as plain as `engine` may be somebody else's, too. Standard library only; knows no command."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("policies", "engine", "loadgen")


def main() -> int:
    """The `headway` command. Returns the exit code."""
    if found := list(strangers(Path(__file__).resolve().parent.parent)):
        print(f"headway: {'; '.join(found)}", file=sys.stderr)
        print(
            "headway: install it into an environment of its own (python3 -m venv), or take these from PYTHONPATH",
            file=sys.stderr,
        )
        return 2
    from router.cli import main as command

    return command()


def strangers(home: Path) -> Iterator[str]:
    """Each of our packages that another one of its name hides."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
        if found != home / name:
            yield f"the package {name!r} at {found or 'no place at all'} is not Headway's, which is at {home / name}"


if __name__ == "__main__":
    sys.exit(main())
