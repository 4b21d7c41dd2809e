"""Reads the configuration: a TOML file, then HEADWAY_* variables, then flags; the later one wins.

Owns how a mistake is explained: file, line, key, what was expected, the nearest key. Never knows what a key means."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from router.settings.config import Config, contradictions

ENV_PREFIX = "HEADWAY_"
FILE_VERSION = 1  # what `version` in a file may say; another one is not half understood
# Keys that had another name: old to new, as TOML writes them, kept for a major version. None was renamed yet.
RENAMED: Mapping[str, str] = {}
EMBEDDED_MODEL = "smollm2"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")  # as engine/loading/hub.py takes it; a test says so
FILE_MAX_BYTES = 1024 * 1024  # a configuration is a page; anything larger is the wrong file

Key = tuple[str, ...]  # ("server", "port")


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake, where it was made."""

    where: str  # "headway.toml:12", "HEADWAY_SERVER_PORT" or "--port"
    key: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.why}" if self.key else f"{self.where}: {self.why}"


class ConfigError(Exception):
    """Everything that is wrong, not the first thing alone."""

    def __init__(self, problems: list[Problem]):
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class _Value:
    value: Any  # as written; the schema has not seen it
    where: str
    is_text: bool = False  # from the environment: "8080" is a number there


Check = Callable[[Config], Iterable[tuple[str, ...]]]  # what is wrong with the whole: keys, the main one first; why


def load(
    path: Path | None,
    env: Mapping[str, str],
    flags: Mapping[str, tuple[str, Any]],
    checks: Sequence[Check] = (),
) -> Config:
    """The configuration in force. `flags`: key ("server.port") -> (flag, value). Raises ConfigError."""
    leaves, problems = _schema(), list[Problem]()
    values: dict[Key, _Value] = {}
    if path is not None:
        _read_file(path, leaves, values, problems)
    _read_env(env, leaves, values, problems)
    for key, (flag, value) in flags.items():
        values[tuple(key.split("."))] = _Value(value, flag)
    config = _build(leaves, values, problems)
    if not problems:
        every: list[Check] = [contradictions, absent, partial(_keyless, env), *checks]
        found = (fault for check in every for fault in check(config))
        problems += [Problem(_where(values, keys), keys[0], why) for *keys, why in found]
    if problems:
        raise ConfigError(problems)
    return config


def _where(values: Mapping[Key, _Value], keys: Sequence[str]) -> str:
    """Where the first of these keys that was set at all was set."""
    set_keys = [key for name in keys if (key := tuple(name.split("."))) in values]
    return values[set_keys[0]].where if set_keys else "default"


def absent(config: Config) -> Iterator[tuple[str, str]]:
    """What the configuration names on this machine and is not there: (key, why)."""
    if not config.upstreams and (why := _unservable(config.model.name)):
        yield "model.name", why
    if any(upstream.kv_events for upstream in config.upstreams) and find_spec("zmq") is None:
        yield "upstreams", "kv_events needs pyzmq: pip install 'headway[kv-events]'"
    for key, path in (("record.path", config.record.path), ("receipts.path", config.receipts.path)):
        if path and not os.access(Path(path).expanduser().absolute().parent, os.W_OK):
            yield key, f"no file can be made at {path}"


def _keyless(env: Mapping[str, str], config: Config) -> Iterator[tuple[str, str]]:
    """Upstreams whose key is in no variable: each of their answers would be 401."""
    for upstream in config.upstreams:
        if upstream.key_env and not env.get(upstream.key_env):
            yield "upstreams", f"{upstream.shown_name}: key_env names {upstream.key_env}, which is not set"


def _unservable(model: str) -> str:
    """Why no worker could load it, as far as its name tells: what it holds is looked at when it is converted."""
    if model == EMBEDDED_MODEL:
        return ""
    path = Path(model).expanduser()
    if model and path.is_dir():
        return "" if (path / "config.json").is_file() else f"{model} is a folder without config.json"
    if model and path.exists():
        return "" if path.suffix == ".gguf" else f"{model} is neither a .gguf file nor a folder"
    if path.suffix == ".gguf" or model.startswith(("/", "./", "../", "~")):
        return f"{model} is not there"
    if HUB_NAME.fullmatch(model):
        return ""
    return f"{model!r} is no model; name {EMBEDDED_MODEL}, a .gguf file, a folder, or org/name on the Hugging Face hub"


# Schema: the tree of structs as flat keys -----------------------------------------------------------------------------


def _schema() -> dict[Key, Any]:
    """Each key that may be set -> its type."""
    return dict(_leaves(Config, ()))


def _leaves(struct: Any, above: Key) -> Iterator[tuple[Key, Any]]:
    for member in msgspec.structs.fields(struct):
        key = (*above, member.encode_name)
        if isinstance(member.type, type) and issubclass(member.type, msgspec.Struct):
            yield from _leaves(member.type, key)
        else:
            yield key, member.type


def env_name(key: Key) -> str:
    """The variable that sets a key: HEADWAY_SERVER_PORT, HEADWAY_CLASSES_CHATBOT_TPOT_S."""
    return ENV_PREFIX + re.sub(r"[^A-Z0-9]+", "_", "_".join(part.rstrip("+") for part in key).upper())


# Sources --------------------------------------------------------------------------------------------------------------


def _read_file(path: Path, leaves: Mapping[Key, Any], values: dict[Key, _Value], problems: list[Problem]) -> None:
    try:
        data = path.read_bytes()
        if len(data) > FILE_MAX_BYTES:
            raise ValueError(f"{len(data)} bytes, more than any configuration needs")
        text = data.decode()
        tree = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # TOMLDecodeError says its line itself
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        problems.append(Problem(str(path), "", f"cannot be read: {why}"))
        return
    lines = _lines(text)
    if (version := tree.pop("version", FILE_VERSION)) != FILE_VERSION:
        where = f"{path}:{_line(lines, ('version',))}"
        problems.append(Problem(where, "version", f"this Headway reads version {FILE_VERSION}, got {version!r}"[:300]))
        return
    for key, value in _flatten(tree, (), _sections(leaves)):
        where = f"{path}:{_line(lines, key)}"
        if key in leaves:
            values[key] = _Value(value, where)
        else:
            problems.append(Problem(where, ".".join(key), _unknown(key, leaves)))


def _read_env(
    env: Mapping[str, str], leaves: Mapping[Key, Any], values: dict[Key, _Value], problems: list[Problem]
) -> None:
    names = {env_name(key): key for key in leaves}
    for name in sorted(name for name in env if name.startswith(ENV_PREFIX)):
        if name in names:
            values[names[name]] = _Value(env[name], name, is_text=True)
        else:
            near = difflib.get_close_matches(name, names, n=1)
            problems.append(Problem(name, "", "no key has this name" + (f"; did you mean {near[0]}?" if near else "")))


def _sections(leaves: Mapping[Key, Any]) -> set[Key]:
    return {key[:depth] for key in leaves for depth in range(1, len(key))}


def _flatten(tree: Mapping[str, Any], above: Key, sections: set[Key]) -> Iterator[tuple[Key, Any]]:
    """Tables that are sections are walked; everything else, tables in the wrong place included, is a value."""
    for name, value in tree.items():
        key = (*above, name)
        if isinstance(value, dict) and key in sections:
            yield from _flatten(value, key, sections)
        else:
            yield key, value


def _unknown(key: Key, leaves: Mapping[Key, Any]) -> str:
    sections = _sections(leaves)
    if key in sections:
        return "is a section, not a value"
    if (now := RENAMED.get(_dotted(key))) is not None:
        return f"is {now} now"
    siblings = {known[-1]: _dotted(known) for known in (*sections, *leaves) if known[:-1] == key[:-1]}
    near = difflib.get_close_matches(key[-1], siblings, n=1)
    if near:
        return f"no such key; did you mean {siblings[near[0]]}?"
    return f"no such key; there are {', '.join(sorted(siblings.values()))}"


def _dotted(key: Key) -> str:
    """As TOML wants it written: classes."chatbot+"."""
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"' for part in key)


# Lines: tomllib keeps none, so a second look at the text finds them ---------------------------------------------------

_TABLE = re.compile(r"^\s*\[\[?\s*([^\[\]]+?)\s*\]")
_ENTRY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")


def _lines(text: str) -> dict[Key, int]:
    """Where each key and each table stands, counted from 1. Good enough for explaining, not for parsing."""
    found: dict[Key, int] = {}
    table: Key = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TABLE.match(line):
            table = _parts(header[1])
            found.setdefault(table, number)
        elif entry := _ENTRY.match(line):
            found.setdefault((*table, *_parts(entry[1])), number)
    return found


def _parts(dotted: str) -> Key:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))


def _line(lines: Mapping[Key, int], key: Key) -> int:
    """The key's own line, else its first part's, else that of the closest table around it (inline tables)."""
    if key not in lines and (parts := [line for name, line in lines.items() if name[: len(key)] == key]):
        return min(parts)
    while key and key not in lines:
        key = key[:-1]
    return lines.get(key, 1)


# Values ---------------------------------------------------------------------------------------------------------------


def _build(leaves: Mapping[Key, Any], values: Mapping[Key, _Value], problems: list[Problem]) -> Config:
    """Each value is converted alone, so that every mistake is found and named."""
    tree: dict[str, Any] = {}
    for key, given in values.items():
        try:
            value = msgspec.convert(_parsed(given), leaves[key], strict=not given.is_text)
        except msgspec.ValidationError as error:
            problems.append(Problem(given.where, ".".join(key), f"{_plain(error)}, got {given.value!r}"[:300]))
            continue
        at = tree
        for part in key[:-1]:
            at = at.setdefault(part, {})
        at[key[-1]] = value
    return msgspec.convert(tree, Config)


def _parsed(given: _Value) -> Any:
    """The environment writes lists and tables as JSON."""
    if given.is_text and given.value[:1] in ("[", "{"):
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(given.value)
    return given.value


def _plain(error: msgspec.ValidationError) -> str:
    """msgspec's sentence without its Python names: "Expected `int`, got `str`" -> "expected a whole number"."""
    sentence = str(error).split(", got")[0].split(" - at")[0].replace(" | null", "")
    for name, plain in (("`int`", "a whole number"), ("`float`", "a number"), ("`str`", "a text in quotes")):
        sentence = sentence.replace(name, plain)
    return sentence[:1].lower() + sentence[1:]
