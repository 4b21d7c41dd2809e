"""`headway keys add | list | revoke`: who may call, for the person at the terminal.

Owns the words. A running router follows the file by itself, so nothing is sent to it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from policies.request import CLASS_NAMES

TEACH = """\
examples:
  headway keys add alice                          a key for tenant alice; it is shown once
  headway keys add bob --organisation acme --class background-agent --requests-per-min 60
  headway keys add bob --model 'qwen*' --tokens-per-month 5e8
  headway keys list
  headway keys revoke 3f2a9c                      the key whose id begins so

The keys file holds digests alone. A running router follows it within a second. Bounds belong to the tenant: giving
one again changes it for all of the tenant's keys."""


def _more_than_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no number above 0")
    return value


def _one_or_more(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no whole number above 0")
    return int(text)


def _class(text: str) -> str:
    if text not in CLASS_NAMES:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is none of {', '.join(CLASS_NAMES)}")
    return text


METAVARS = {str: "NAME", _class: "CLASS"}
BOUNDS = {  # flag -> (field of TenantRow, type, help)
    "organisation": ("organisation", str, "whose KV cache it shares; default: the tenant alone"),
    "salt-domain": ("salt_domain", str, "who shares the KV cache, where it is not the organisation"),
    "class": ("most_urgent", _class, f"the most urgent class it may have: {', '.join(CLASS_NAMES)}"),
    "weight": ("weight", _more_than_zero, "of its fair share inside a class; default 1"),
    "requests-per-min": ("requests_per_min", _more_than_zero, "then 429"),
    "concurrency": ("concurrency", _one_or_more, "requests at one time; then 429"),
    "tokens-per-month": ("tokens_per_month", _more_than_zero, "prompt and output; then 429 until the month ends (UTC)"),
    "gpu-seconds-per-month": ("gpu_s_per_month", _more_than_zero, "likewise"),
}


def add_to(commands: Any, default_file: Callable[[], Path | None]) -> None:
    """Teach the `headway` command its `keys`; `default_file`: the configuration to read where none is named."""
    parser = commands.add_parser(
        "keys",
        help="who may call: add, list and revoke keys",
        epilog=TEACH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    add = verbs.add_parser("add", help="make a key and show it, once")
    add.add_argument("tenant", help="who pays; made if new")
    add.add_argument("--model", action="append", default=[], metavar="PATTERN", help="the key is good for these alone")
    for flag, (field, kind, text) in BOUNDS.items():
        add.add_argument(f"--{flag}", dest=field, type=kind, metavar=METAVARS.get(kind, "NUMBER"), help=text)
    listing = verbs.add_parser("list", help="tenants and the ids of their keys")
    revoke = verbs.add_parser("revoke", help="forget a key")
    revoke.add_argument("id", help="as `list` shows it, or its beginning")
    for verb, run in ((add, _add), (listing, _list), (revoke, _revoke)):
        verb.add_argument("--config", type=Path, metavar="FILE", help="default: headway.toml if it exists")
        verb.set_defaults(run=_with_path(run, default_file))


def _with_path(
    run: Callable[[Path, argparse.Namespace], None], default_file: Callable[[], Path | None]
) -> Callable[[argparse.Namespace], int]:
    def command(arguments: argparse.Namespace) -> int:
        from router.access.keys import KeysError, keys_path
        from router.settings.config_load import ConfigError, load

        try:
            run(keys_path(load(arguments.config or default_file(), os.environ, {})), arguments)
        except OSError as error:
            print(f"headway: {error.filename}: {error.strerror}", file=sys.stderr)
            return 1
        except (ConfigError, KeysError) as error:
            print(f"headway: {error}", file=sys.stderr)
            return 1
        return 0

    return command


def _add(path: Path, arguments: argparse.Namespace) -> None:
    from router.access import keys

    given = vars(arguments)
    changes = {field: given[field] for field, _, _ in BOUNDS.values() if given[field] is not None}
    key = keys.add(path, arguments.tenant, changes, tuple(arguments.model), time.strftime("%Y-%m-%d"))
    print(key)  # alone on stdout, so that a script can take it
    print(f"headway: shown once; {path} keeps its digest, id {keys.digest(key)[: keys.ID_CHARS]}", file=sys.stderr)


def _list(path: Path, _: argparse.Namespace) -> None:
    from router.access import keys

    file = keys.read(path)
    if file is None:
        print(f"no keys: {path} does not exist, and who is on this machine needs none")
        return
    for name, tenant in file.tenants.items():
        bounds = [f"{flag} {value}" for flag, (field, *_) in BOUNDS.items() if (value := getattr(tenant, field))]
        print(f"{name}: {', '.join(bounds)}")
        for row in file.keys:
            if row.tenant == name:
                models = f", for {', '.join(row.models)}" if row.models else ""
                print(f"  {row.id}  made {row.created}{models}")


def _revoke(path: Path, arguments: argparse.Namespace) -> None:
    from router.access import keys

    row = keys.revoke(path, arguments.id)
    print(f"key {row.id} of {row.tenant} is revoked")
