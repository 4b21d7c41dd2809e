"""Removes from system prompts what clients change for reasons of their own: nothing behind it could be shared.

Owns the rules. Touches what the client says of itself, never what it asks."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from router.language.turn import Message

Rule = Callable[[str], str]  # a system message's text to the same without what is volatile


def _without(begins: str, pattern: str) -> Rule:
    """Removes a pattern; `begins` is a literal that every match holds, and that a long text is searched for first."""
    compiled = re.compile(pattern, re.MULTILINE)
    return lambda text: compiled.sub("", text) if begins in text else text


class RuleError(Exception):
    """A rule is configured that there is not."""


RULES: dict[str, Rule] = {
    # Claude Code's first block: it differs between sessions and subagents with the same 75 kB behind it.
    "claude-code-billing": _without("x-anthropic-billing-header:", r"^x-anthropic-billing-header:[^\n]*\n*"),
    # A counter of tokens left, another one each turn. The model may have a use for it, so it is removed on demand.
    "total-tokens": _without("<total_tokens>", r"<total_tokens>[^<]*</total_tokens>\n?"),
}


def load(names: Sequence[str]) -> list[Rule]:
    """Rules by name, or as `module:function`. Raises RuleError for one that does not exist."""
    return [RULES.get(name) or _imported(name) for name in names]


# Hot: once per request; an agent's system prompt of 75 kB takes 10 us when nothing is to be removed.
def canonical(messages: tuple[Message, ...], rules: Sequence[Rule]) -> tuple[Message, ...]:
    """The messages with every system message rewritten; the very same when nothing is to be."""
    rewritten = {
        number: text
        for number, message in enumerate(messages)
        if message.role == "system" and (text := _applied(rules, message.content)) != message.content
    }
    if not rewritten:
        return messages
    each = (replace(message, content=rewritten.get(at, message.content)) for at, message in enumerate(messages))
    return tuple(message for message in each if message.content or message.role != "system")


def _applied(rules: Sequence[Rule], text: str) -> str:
    for rule in rules:
        text = rule(text)
    return text


def _imported(name: str) -> Rule:
    module, _, function = name.partition(":")
    try:
        rule = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RuleError(f"no rule is named {name!r}: {error}") from None
    if not callable(rule):
        raise RuleError(f"{name!r} is no function")
    return rule  # type: ignore[no-any-return]
