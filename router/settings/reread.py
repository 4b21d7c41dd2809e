"""`python -m router.settings.reread`: all sources once more, for a router that runs. The keeper starts it.

Owns the way from the person's sources to the file that a router reads. Writes nothing where anything is wrong."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from router.access.keys import KeysError
from router.cli import checked
from router.settings.config_load import ConfigError


def main() -> int:
    """0, or 1 with what is wrong on stderr."""
    parser = argparse.ArgumentParser(prog="python -m router.settings.reread", description=__doc__)
    parser.add_argument("--file", default="", help="the TOML file; empty: none")
    parser.add_argument("--flags", default="{}", help="key to flag and value, as JSON")
    parser.add_argument("--out", type=Path, required=True, help="what the router reads")
    arguments = parser.parse_args()
    flags = {key: (str(flag), value) for key, (flag, value) in json.loads(arguments.flags).items()}
    try:
        config = checked(Path(arguments.file) if arguments.file else None, flags, os.environ)
    except (ConfigError, KeysError) as error:
        print(error, file=sys.stderr)
        return 1
    made = arguments.out.with_name(arguments.out.name + ".new")
    made.write_bytes(config.to_json())
    made.replace(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
