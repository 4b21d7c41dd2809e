"""The request path in one process: the real listener, routes, text layer and relay, before a scripted mind and fleet.

Owns the scripts. Tests drive tokens by hand through `Attempt`, or let `answer` do it."""

from __future__ import annotations

import asyncio
import socket
import time
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.kv import keys
from engine.wire import End, Start, Submit
from policies.actions import Cancel, Dispatch, Reject, Tokenise
from policies.request import Budget, Request, RequestClass, RequestId, Tenant, WorkerId
from router.access.accounts import Accounts
from router.access.salts import Salts
from router.access.tenants import Tenants
from router.delivery.kept import KeptAnswers
from router.delivery.order import RelayLimits, Services
from router.delivery.ports import Client, Sink
from router.errors import RequestError
from router.language.canonical import Rule
from router.language.template import ChatTemplate
from router.language.text import Text, TextLimits
from router.language.vocabulary import Vocabulary
from router.listener.app import App, House, generation, shape_of
from router.listener.server import Listener, ListenerLimits
from router.telemetry.receipts import Receipt
from router.workers.fleet import ModelView
from router.workers.link import LinkLost

CONTEXT_MAX = 4096
DEADLINE_S = 60.0  # of each wait, none of which takes a second: only what never comes takes it
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_json() -> dict[str, Any]:
    """One token a byte, and two marks."""
    import json

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    return definition


VOCABULARY = Vocabulary(tokenizer_json())
MARKS = {"start": 256, "end": 257}
VIEW = ModelView("tiny", "digest", keys.root("tiny"), 16, CONTEXT_MAX, len(VOCABULARY), ("w0",))


def ids_of(text: str) -> list[int]:
    """Token ids of plain text."""
    return VOCABULARY.encode_data([text])[0]


class Attempt:
    """One attempt as the worker sees it; the test is the worker."""

    def __init__(self, fleet: Fleet, worker: WorkerId, order: Submit, sink: Sink) -> None:
        self.fleet, self.worker, self.order, self.sink = fleet, worker, order, sink
        self.aborted = ""
        self.weights_version = fleet.weights_version

    @property
    def ids(self) -> list[int]:
        return list(array("i", self.order.ids))

    def abort(self, reason: str) -> None:
        self.aborted = reason

    def start(self, cached_tokens: int = 0) -> None:
        self.sink.started(Start(0, cached_tokens, 0.0, 0.01))

    def say(self, ids: list[int]) -> None:
        """A step's tokens."""
        if not self.aborted:
            self.sink.tokens(ids)

    def end(self, reason: str = "stop", message: str = "") -> None:
        if not self.aborted:
            self.sink.ended(End(0, reason, 0, 0, message))


class Fleet:
    """Keeps attempts for the test; `answer`, when set, serves each at once."""

    def __init__(self) -> None:
        self.attempts: asyncio.Queue[Attempt] = asyncio.Queue()
        self.answer: Callable[[Attempt], None] | None = None
        self.is_lost = False
        self.weights_version = 0
        self.views = {"tiny": VIEW}

    def submit(self, worker: WorkerId, request_id: RequestId, order: Submit, sink: Sink) -> Attempt:
        del request_id
        if self.is_lost:
            raise LinkLost("no link")
        attempt = Attempt(self, worker, order, sink)
        self.attempts.put_nowait(attempt)
        if self.answer is not None:
            asyncio.get_running_loop().call_soon(self.answer, attempt)
        return attempt

    def name(self, worker: WorkerId) -> str:
        return f"w{worker}"

    def cost_s(self, worker: WorkerId, prompt: int, cached: int, output: int) -> float:
        del worker
        return (prompt - cached) * 0.001 + output * 0.01

    async def next(self) -> Attempt:
        async with asyncio.timeout(DEADLINE_S):
            return await self.attempts.get()


class Mind:
    """Says yes at once, unless the test wants something else."""

    def __init__(self) -> None:
        self.request_class = RequestClass.CHATBOT
        self.offered: list[Request] = []
        self.gone_ids: list[RequestId] = []
        self.stops: dict[RequestId, int] = {}
        self.failures: list[str] = []
        self.holds = False
        self.refusal: Reject | None = None
        self.attempts_max = 2
        self.clients: dict[RequestId, Client] = {}
        self.tokens: dict[RequestId, int] = {}

    def offer(self, request: Request, client: Client) -> None:
        self.offered.append(request)
        self.clients[request.id] = client
        try:
            client.tokenise(Tokenise(request.id, self.request_class, "default"))
        except ArithmeticError:  # as the live mind does with any fault of a client
            self.gone(request.id)
            client.broke()

    def arrived(self, request_id: RequestId, tokens: int, chain: bytes) -> None:
        assert len(chain) % keys.KEY_BYTES == 0
        self.tokens[request_id] = tokens
        if self.refusal is not None:
            self.clients.pop(request_id).reject(self.refusal)
        elif not self.holds:
            self.place(request_id)

    def place(self, request_id: RequestId) -> None:
        budget = Budget(1.0, 0.04)
        self.clients[request_id].dispatch(
            Dispatch(request_id, WorkerId(0), self.request_class, budget, 0.9, float("inf"), 0.1, 0, "within budget")
        )

    def gone(self, request_id: RequestId) -> None:
        self.gone_ids.append(request_id)
        self.clients.pop(request_id, None)

    def stopped(self, request_id: RequestId, output_tokens: int) -> None:
        self.stops[request_id] = output_tokens
        self.clients.pop(request_id, None)

    def failed(self, request_id: RequestId, worker: WorkerId, reason: str) -> None:
        del worker
        self.failures.append(reason)
        if len(self.failures) < self.attempts_max:
            self.place(request_id)
        else:
            self.clients.pop(request_id).reject(refusal(503, "attempts"))

    def cancel(self, request_id: RequestId) -> None:
        self.clients[request_id].cancel(Cancel(request_id, WorkerId(0), "moved"))


def refusal(status: int, reason: str, retry_after_s: float | None = 7.0) -> Reject:
    return Reject(RequestId("r"), RequestClass.CHATBOT, status, reason, "No.", retry_after_s)


@dataclass
class Desk:
    """Everything a test needs."""

    mind: Mind
    fleet: Fleet
    listener: Listener
    address: tuple[str, int]
    client: httpx.AsyncClient
    hints: Hints
    receipts: list[Receipt] = field(default_factory=list)

    def ended(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)

    async def raw(self, sent: bytes) -> bytes:
        """All that a bare socket gets back until the server closes it."""
        reader, writer = await asyncio.open_connection(*self.address)
        try:
            writer.write(sent)
            async with asyncio.timeout(DEADLINE_S):
                return await reader.read(-1)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def settled(self) -> None:
        """Wait until every request has ended and its handler with it."""
        await self.until(lambda: bool(self.receipts) and not self.listener.tasks)

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until callbacks of this loop have made it so."""
        async with asyncio.timeout(DEADLINE_S):
            while not is_so():  # noqa: ASYNC110
                await asyncio.sleep(0)


class Hints:
    """Keeps what it is asked, and whose it is."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, bytes | None]] = []

    async def obey(self, body: bytes, salt: bytes | None = None) -> bytes:
        if body in (b"{}", b"{"):
            raise RequestError(400, "This is no hints envelope.")
        self.asked.append((body, salt))
        return b'{"message_id":"m","actions":[]}'


def keyless(tenant: Tenant = Tenant()) -> Tenants:  # noqa: B008
    """Whoever is on this machine."""
    return Tenants(None, Salts(b"s" * 32), tenant, Accounts(None, time.monotonic, time.time))


@asynccontextmanager
async def desk(
    *,
    listener_limits: ListenerLimits | None = None,
    relay_limits: RelayLimits | None = None,
    text_limits: TextLimits | None = None,
    template: str = TEMPLATE,
    rules: Sequence[Rule] = (),
    tenants: Tenants | None = None,
    refuses_media: bool = False,
    kept: KeptAnswers | None = None,
) -> AsyncIterator[Desk]:
    """A desk that is open."""
    mind, fleet, hints, sock = Mind(), Fleet(), Hints(), socket.create_server(("127.0.0.1", 0))
    address = sock.getsockname()[:2]
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{address[1]}", timeout=DEADLINE_S)
    receipts: list[Receipt] = []

    class Book:
        def ended(self, receipt: Receipt) -> None:
            receipts.append(receipt)

    services = Services(
        mind, fleet, Book(), relay_limits or RelayLimits(), time.monotonic, kept=KeptAnswers() if kept is None else kept
    )
    text = Text(VOCABULARY, ChatTemplate(template, {}), text_limits, rules=rules, refuses_media=refuses_media)
    tenants = tenants or keyless()
    app = App(
        House(
            models=lambda: fleet.views,
            model="tiny",
            posts=generation(services, text, tenants, hints),
            tenants=tenants,
            readiness=lambda: (True, {"workers": 1}),
            aliases={"claude-*": "", "gpt-*": "", "other": "no-such-model"},
        )
    )
    listener = Listener(app.gate, app.handle, listener_limits, shape_of)
    await listener.start(sock)
    try:
        yield Desk(mind, fleet, listener, (address[0], address[1]), client, hints, receipts)
    finally:
        await client.aclose()
        await listener.close()


def speak(text: str, *, cached_tokens: int = 0, reason: str = "stop") -> Callable[[Attempt], None]:
    """An `answer` that says `text`, one token a step, as the worker would."""

    def answer(attempt: Attempt) -> None:
        attempt.start(cached_tokens)
        for token in ids_of(text):
            attempt.say([token])
        attempt.end(reason)

    return answer


def run(work: Coroutine[Any, Any, None]) -> None:
    """A test's coroutine."""
    asyncio.run(work)


TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls or () %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Users and assistants in turn, and ids of calls of nine characters: what Mistral's templates refuse, this one does.
IN_TURN_TEMPLATE = (
    "{% set ns = namespace(index=0) %}{% for m in messages %}"
    "{% if m.role == 'tool' and m.tool_call_id | length != 9 %}{{ raise_exception('ids of nine') }}{% endif %}"
    "{% for call in m.tool_calls or () if call.id | length != 9 %}{{ raise_exception('ids of nine') }}{% endfor %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}"
    "{% if not (m.role in ('tool', 'system') or m.tool_calls) %}"
    "{% if (m.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('users and assistants in turn') }}{% endif %}"
    "{% set ns.index = ns.index + 1 %}{% endif %}{% endfor %}" + TOOL_TEMPLATE
)
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + IN_TURN_TEMPLATE
)


def chat(text: str = "hi", **fields: Any) -> dict[str, Any]:
    """A body for chat completions."""
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}
