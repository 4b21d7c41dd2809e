"""What a request says of itself: headers and body become the facts that the mind classifies by.

Owns the names that clients use. Never decides: every one of these can be forged, and the mind knows."""

from __future__ import annotations

import json
from typing import Any, Protocol

import xxhash

from policies.request import CLASS_LABELS, CLASS_NAMES, Facts, Request, RequestClass, RequestId, Tenant
from router.dialects.schema import CompletionRequest
from router.errors import RequestError
from router.language.turn import Turn
from router.listener.exchange import Exchange, Head
from router.parsers.voice import offered

TEMPLATE_CHARS = 2048  # siblings of one template share so much of their beginning
CHARS_A_TOKEN = 4  # for the estimate before tokenising
INTERACTIVE_TOOLS = frozenset(("AskUserQuestion", "EnterPlanMode", "ExitPlanMode", "request_user_input"))
SESSION_HEADERS = (
    b"x-claude-code-session-id",
    b"session-id",
    b"thread-id",
    b"session_id",
    b"conversation_id",
    b"x-session-affinity",
    b"x-session-id",
    b"x-opencode-session",
)
SESSION_CHARS_MAX = 256  # of a session's name; a longer one is known by its digest, since 16,384 names are remembered
TIMEOUT_HEADERS = (b"x-stainless-read-timeout", b"x-stainless-timeout")
SIDE_SOURCES = ("thread_title",)
SIDE_KINDS = ("compaction",)


class Declared(Protocol):
    """What a body may say of its work: a dialect's whole schema, or the few fields read of one that is passed on."""

    @property
    def service_tier(self) -> str | None: ...
    @property
    def background(self) -> bool: ...
    @property
    def completion_window(self) -> str | None: ...
    @property
    def metadata(self) -> dict[str, Any] | None: ...
    @property
    def prompt_cache_key(self) -> str | None: ...
    @property
    def user(self) -> str | None: ...


def describe(
    request_id: RequestId, exchange: Exchange, body: Declared, turn: Turn, *, model: str, tenant: Tenant
) -> Request:
    """The request as the mind sees it. Raises RequestError 400 for a class that does not exist."""
    head = exchange.head
    named = _bounded(session_key(head, body))
    session = named or _lineage(turn)
    return Request(
        id=request_id,
        tenant=tenant,
        session=session,
        model=model,
        facts=facts(head, body, turn, has_session=bool(named)),
        arrived=exchange.arrived,
        body_bytes=len(exchange.body),
        estimated_tokens=_estimate(exchange, turn),
        max_output=turn.max_tokens,
        declared_timeout_s=_timeout_s(head),
        body_hash=0 if session else xxhash.xxh3_64_intdigest(exchange.body),  # SDKs send the same bytes again
    )


def _estimate(exchange: Exchange, turn: Turn) -> int:
    """Tokens of the prompt, before they are counted."""
    if turn.ids is not None:
        return len(turn.ids)
    return max(1, (len(exchange.body) if turn.text is None else len(turn.text)) // CHARS_A_TOKEN)


def facts(head: Head, body: Declared, turn: Turn, *, has_session: bool) -> Facts:
    """Declared facts of headers and body."""
    codex = _json_object(head.header(b"x-codex-turn-metadata") or "")
    side = codex.get("thread_source") in SIDE_SOURCES or codex.get("request_kind") in SIDE_KINDS
    spoken = (message.role for message in reversed(turn.messages) if message.role != "system")
    last_role = next(spoken, "user")  # Claude Code puts a system message behind the user's
    return Facts(
        declared_class=_declared_class(head),
        service_tier=(body.service_tier or "").lower(),
        background=body.background,
        completion_window=body.completion_window or "",
        user_agent=(head.header(b"user-agent") or "").lower(),
        originator=(head.header(b"originator") or "").lower(),
        turn_trigger=str(codex.get("turn_trigger", "")),
        is_side_call=side,
        agent_id=head.header(b"x-claude-code-agent-id") or "",
        stream=turn.is_stream,
        message_count=max(1, len(turn.messages)),
        prompt_count=_prompt_count(body),
        last_role="tool" if last_role == "function" else last_role,
        tool_count=len(turn.tools),
        has_interactive_tools=not INTERACTIVE_TOOLS.isdisjoint(offered(turn)),
        has_json_schema=turn.has_schema,
        has_session=has_session,
        template_hash=xxhash.xxh3_64_intdigest(_beginning(turn)),
    )


def session_key(head: Head, body: Declared) -> str:
    """The client's own name for its session; empty if it has none."""
    for name in SESSION_HEADERS:
        if value := head.header(name):
            return value
    user_id = (body.metadata or {}).get("user_id")
    if isinstance(user_id, str) and user_id:
        return str(_json_object(user_id).get("session_id") or user_id)
    return body.prompt_cache_key or body.user or ""


def _bounded(name: str) -> str:
    return name if len(name) <= SESSION_CHARS_MAX else xxhash.xxh3_128_hexdigest(name.encode())


def _declared_class(head: Head) -> RequestClass | None:
    name = head.header(b"x-headway-class")
    if name is None:
        return None
    if name.lower() not in CLASS_NAMES:
        message = f"The header x-headway-class must be one of {', '.join(CLASS_LABELS)} (or chat, agent, batch)."
        raise RequestError(400, message, param="x-headway-class", code="invalid_value")
    return CLASS_NAMES[name.lower()]


def _timeout_s(head: Head) -> float | None:
    for name in TIMEOUT_HEADERS:
        try:
            seconds = float(head.header(name) or "nan")
        except ValueError:
            continue
        if 0 < seconds < float("inf"):
            return seconds
    return None


def _json_object(text: str) -> dict[str, Any]:
    """A header or field that should hold a JSON object; what does not is nobody's fault and says nothing."""
    if not text.startswith("{"):
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _prompt_count(body: Declared) -> int:
    if not (isinstance(body, CompletionRequest) and isinstance(body.prompt, list)):
        return 1
    return max(1, sum(isinstance(part, (str, list)) for part in body.prompt))


def _beginning(turn: Turn) -> bytes:
    """What siblings of one template share: the first 2 KB of a prompt, of a short one its first half or less.

    The length is a power of two, so that siblings with suffixes of different lengths are cut alike."""
    if turn.ids is not None:
        return turn.ids[: _cut(len(turn.ids), TEMPLATE_CHARS // CHARS_A_TOKEN)].tobytes()
    texts = [turn.text or ""] if not turn.messages else [message.content for message in turn.messages]
    left = _cut(sum(map(len, texts)), TEMPLATE_CHARS)
    parts = []
    for text in texts:
        parts.append(text[:left])
        left -= len(parts[-1])
        if left <= 0:
            break
    return chr(0).join(parts).encode()


def _cut(length: int, most: int) -> int:
    """The largest power of two that is no more than half of `length`, and no more than `most`."""
    return min(most, 1 << max(0, (length // 2).bit_length() - 1))


def _lineage(turn: Turn) -> str:
    """A name for the conversation of a client that has none: what it began with. A turn alone begins nothing."""
    opening = [message.content for message in turn.messages[:2]]
    if len(turn.messages) < 2:
        return ""
    return f"lineage-{xxhash.xxh3_64_hexdigest(chr(0).join(opening).encode())}"
