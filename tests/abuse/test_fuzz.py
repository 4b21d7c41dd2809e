"""Fuzz: each parser of foreign bytes, fed mutations of good ones. It parses or says what is wrong; nothing else.

Some thousand inputs a target in CI, drawn from one seed; by night as many as a minute takes, from a new seed each time,
which a failure prints."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from engine.wire import FrameReader, WireError, decode_from_worker, encode
from router.access import keys
from router.access.keys import KeysError
from router.dialects import chat as chat_dialect
from router.dialects import completions, messages, responses
from router.errors import RequestError
from router.language.turn import Turn
from router.language.vocabulary import Detokeniser
from router.settings.config_load import ConfigError, load
from router.upstreams import peek
from router.upstreams.loads import read_load
from router.upstreams.replies import Told, figures, said_wrong, told
from tests.router.desk import DEADLINE_S, VOCABULARY, chat, desk, run, speak
from tests.router.frames import hello, step
from tests.router.upstreams.scripted import DONE, WHOLE, Asked, Scripted, delta, upstream_desk
from tests.router.upstreams.test_forward import at
from tests.wire.test_framing import LAST_GET, post

ROUNDS = 1500
NIGHTLY_S = 60.0
PIECES = (
    *(b"", b"\x00", b"\r\n", b"\n", b'"', b"{", b"}", b"[", b"]", b":", b",", b"\xff\xfe", b"\xf0\x9f", b"\\ud800"),
    *(b"null", b"true", b"NaN", b"-1", b"1e999", b"9" * 400, b"a" * 5000),
    *(
        b"data: ",
        b"[DONE]",
        b"event: error\n",
        b"0\r\n\r\n",
        b"content-length: 0\r\n",
        b"transfer-encoding: chunked\r\n",
    ),
)

Target = Callable[[bytes], None]


def mutated(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One seed with a few bytes changed, cut, doubled, or joined with another one."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randrange(1, 6)):
        at, to = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        kind = rng.randrange(6)
        if kind == 0:
            data[at:to] = b""
        elif kind == 1:
            data[at:at] = rng.choice(PIECES)
        elif kind == 2:
            data[at:at] = data[at:to][:2000]
        elif kind == 3 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 4:
            data[at:] = rng.choice(seeds)[at:]
        else:
            data[at:to] = rng.choice(PIECES)
        del data[100_000:]
    return bytes(data)


def fuzz(target: Target, seeds: Sequence[bytes], is_nightly: bool) -> None:
    seed = random.SystemRandom().randrange(2**32) if is_nightly else 1
    rng, until = random.Random(seed), time.monotonic() + NIGHTLY_S
    count = 0
    while time.monotonic() < until if is_nightly else count < ROUNDS:
        count += 1
        data = mutated(rng, seeds)
        try:
            target(data)
        except Exception as error:
            raise AssertionError(f"seed {seed}, input {count}: {data[:500]!r}") from error


BODIES = [
    b'{"model":"tiny","messages":[{"role":"system","content":"be kind"},{"role":"user",'
    b'"content":[{"type":"text","text":"hi"}]}],"temperature":0.5,"stop":["a"],"stream":true,'
    b'"tools":[{"type":"function","function":{"name":"f","parameters":{}}}]}',
    b'{"model":"tiny","prompt":["a","b"],"max_tokens":5,"logprobs":1}',
    b'{"model":"tiny","max_tokens":9,"system":[{"type":"text","text":"s","cache_control":{"type":"ephemeral"}}],"messages":'
    b'[{"role":"user","content":"x"},{"role":"assistant","content":[{"type":"tool_use","id":"t","name":"f","input":{}}]},'
    b'{"role":"user","content":[{"type":"tool_result","tool_use_id":"t","content":"r"}]}],"thinking":{"type":"enabled"}}',
    b'{"model":"tiny","store":false,"input":[{"type":"message","role":"user","content":[{"type":"input_text","text":"x"}]},'
    b'{"type":"function_call","call_id":"c","name":"f","arguments":"{}"}],"reasoning":{"effort":"low"}}',
]  # fmt: skip
DIALECTS = {
    "chat": chat_dialect.CHAT,
    "completions": completions.COMPLETIONS,
    "messages": messages.MESSAGES,
    "responses": responses.RESPONSES,
}


def read_body(name: str) -> Target:
    dialect = DIALECTS[name]

    def target(data: bytes) -> None:
        try:
            assert isinstance(dialect.turn(dialect.read(data)), Turn)
        except RequestError as error:
            status, _, body = dialect.errors.refusal(error)
            assert 400 <= status < 500
            assert len(body) <= 1024

    return target


def peek_body(data: bytes) -> None:
    with contextlib.suppress(RequestError):
        seen = peek.look(data)
        assert seen.tokens > 0
        assert len(seen.chain(b"s" * 16)) % 16 == 0
        seen.body("model", 1)


def read_reply(data: bytes) -> None:
    assert all(number is None or number >= 0 for number in figures(data, Told()))
    assert len(said_wrong(data) or "") <= 600
    assert len(told(400, data).message) <= 600


def read_metrics(data: bytes) -> None:
    loads = read_load(data)
    assert loads is None or (loads.running >= 0 and loads.waiting >= 0 and 0 <= loads.cache_share <= 1)


def read_frame(data: bytes) -> None:
    reader = FrameReader()
    with contextlib.suppress(WireError):
        for at in range(0, len(data), 7):  # in pieces, as sockets do
            for frame in reader.feed(data[at : at + 7]):
                decode_from_worker(frame)


def read_keys(data: bytes) -> None:
    with contextlib.suppress(KeysError):
        keys.parse(Path("keys.json"), data)


def read_config(data: bytes) -> None:
    path = Path(os.environ["FUZZ_FILE"])
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        load(path, {}, {})


def detokenise(data: bytes) -> None:
    ids = [byte % len(VOCABULARY) for byte in data[:300]]
    whole, parts = Detokeniser(VOCABULARY.tables), Detokeniser(VOCABULARY.tables)
    said = whole.feed(ids) + whole.flush()
    assert "".join([parts.feed([token]) for token in ids]) + parts.flush() == said


METRICS = (
    b'# HELP x\nvllm:num_requests_running{model="m"} 3.0\nvllm:num_requests_waiting 1\nvllm:kv_cache_usage_perc 0.5\n'
)
CONFIG = b'[server]\nport = 1\n[classes."chatbot+"]\ntpot_s = 0.1\n[[upstreams]]\nurl = "http://a"\nmodels = {a = "b"}'
KEYS = (
    b'{"tenants": {"a": {"organisation": "b", "weight": 1.5}}, "keys": [{"digest": "'
    + b"0" * 64
    + b'", "tenant": "a"}]}'
)
ERROR = b'data: {"error": {"message": "x", "code": "y"}, "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n'
TARGETS: dict[str, tuple[Target, Sequence[bytes]]] = {
    **{f"body of {name}": (read_body(name), BODIES) for name in DIALECTS},
    "forwarded body": (peek_body, BODIES),
    "upstream's reply": (read_reply, [WHOLE, ERROR, delta("x"), b'{"object": "error", "message": "m"}']),
    "upstream's metrics": (read_metrics, [METRICS, METRICS.replace(b"vllm:num_requests_", b"sglang:num_")]),
    "worker's frame": (read_frame, [encode(hello()), encode(step({1: [2, 3]}))]),
    "keys file": (read_keys, [KEYS]),
    "configuration": (read_config, [CONFIG]),
    "token ids": (detokenise, ["Grüße 🌍 東京".encode(), bytes(range(256))]),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_parses_or_says_what_is_wrong(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUZZ_FILE", str(tmp_path / "f.toml"))
    fuzz(*TARGETS[name], is_nightly=False)


@pytest.mark.nightly
@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_parses_or_says_what_is_wrong_for_a_minute(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUZZ_FILE", str(tmp_path / "f.toml"))
    fuzz(*TARGETS[name], is_nightly=True)


# Whole sockets --------------------------------------------------------------------------------------------------------

REQUESTS = [
    LAST_GET,
    post(b"content-length: %d" % len(BODIES[1]), b"connection: close", body=BODIES[1]),
    post(
        b"transfer-encoding: chunked", b"connection: close", body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODIES[1]), BODIES[1])
    ),
]


@pytest.mark.parametrize("rounds", [150, pytest.param(6000, marks=pytest.mark.nightly)])
def test_the_listener_answers_any_bytes_with_whole_responses_and_no_fault(rounds: int) -> None:
    rng = random.Random(rounds)

    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("ok")
            for _ in range(rounds):
                sent = mutated(rng, REQUESTS)
                answer = await answered(d.address, sent)
                statuses = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]
                assert all(status < 500 for status in statuses), (sent, answer)
            await d.until(lambda: not d.listener.tasks)
            assert d.mind.offered
            assert len(d.receipts) == len(d.mind.offered)  # each ended once

    run(work())


async def answered(address: tuple[str, int], sent: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(sent)
        writer.write_eof()
        async with asyncio.timeout(DEADLINE_S):
            return await reader.read(-1)
    except ConnectionError:
        return b""
    finally:
        writer.close()


REPLIES = [
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in (delta("a"), delta("b", "stop"), DONE))
    + b"0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(WHOLE) + WHOLE,
    b"HTTP/1.1 400 No\r\ncontent-length: 37\r\n\r\n" + b'{"error": {"message": "no", "code": 1}}',
]


@pytest.mark.parametrize("rounds", [100, pytest.param(3000, marks=pytest.mark.nightly)])
def test_whatever_an_upstream_says_each_request_ends_once_and_honestly(rounds: int) -> None:
    rng = random.Random(rounds)

    async def script(asked: Asked) -> None:
        with contextlib.suppress(ConnectionError):
            await asked.say(mutated(rng, REPLIES))
        asked.writer.close()

    async def work() -> None:
        async with Scripted(script) as one, upstream_desk(at(one)) as d:
            for number in range(rounds):
                body = chat() | {"model": "m", "stream": bool(number % 2)}
                answer = await d.client.post("/v1/chat/completions", json=body)
                receipt = await d.settled(number + 1)
                has_error = b'data: {"error"' in answer.content  # cut, or given up after a few attempts
                assert not (has_error and answer.content.rstrip().endswith(b"[DONE]"))
                if answer.status_code == 200 and number % 2 and b"data: " in answer.content:
                    assert has_error == (receipt.outcome == "failed")
                await d.until(lambda: d.upstreams.up_count == 1)

    run(work())
