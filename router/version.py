"""Which code this is, for recordings, traces and people.

Owns nothing else. Never reads git: an installed package has none."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def code_version() -> str:
    """The version of the installed package; of a bare checkout, only that it is one."""
    try:
        return version("headway")
    except PackageNotFoundError:
        return "0+checkout"
