"""Options: the checks that several commands share.

Owns what counts as a number, a share or a divisor on the command line. Never runs anything."""

from __future__ import annotations

import argparse

TIMES_MAX = 1000.0  # copies of a trace, all in memory
Commands = argparse._SubParsersAction  # noqa: SLF001  the type that add_subparsers returns has no public name


def command(commands: Commands[argparse.ArgumentParser], name: str, says: str, teach: str) -> argparse.ArgumentParser:
    """A command whose help ends with examples."""
    epilog = "examples:\n" + "\n".join(f"  headway-loadgen {name} {line}" for line in teach.strip().splitlines())
    shape = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=says, description=says, epilog=epilog, formatter_class=shape)


def positive(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def not_negative(text: str) -> float:
    """A finite number from 0."""
    value = float(text)
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return value


def times(text: str) -> float:
    """How many times the sessions: above 0, and no more than memory has room for."""
    value = positive(text)
    if value > TIMES_MAX:
        raise argparse.ArgumentTypeError(f"{text} is over {TIMES_MAX:g} times the sessions")
    return value


def count(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if not 0 < value < 1 << 40:
        raise argparse.ArgumentTypeError(f"{text} is not a positive count")
    return value


def whole(text: str) -> int:
    """A whole number from 0."""
    return 0 if text == "0" else count(text)


def share(text: str) -> float:
    """From 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value


def divisor(text: str) -> int:
    """`1/16`, or 1."""
    one, slash, below = text.partition("/")
    if one != "1" or (slash and not below.isdecimal()) or int(below or 1) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not of the form 1/16")
    return int(below or 1)
