"""A fake engine for the judge's bench: answers every dialect at a fixed pace and stamps each token as it sends it.

Owns one port and the stamps, by request number (also the answer's x-headway-worker). Never computes anything."""

# python -m bench.fake_engine PORT FIRST_S PACE_S [stamp] [slots=N]: prints "ready PORT"; GET /stamps gives all send
# times. With slots, so many streams are answered at once and the others wait in line, as in front of a full engine.

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from typing import cast

import msgspec
import uvloop

HEAD = "HTTP/1.1 200 OK\r\nx-headway-worker: {}\r\ncontent-type: {}\r\n"
SLOTS = 1 << 30  # no line unless one is asked for
STREAM = "text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Asked(msgspec.Struct):
    """What matters of a body."""

    max_tokens: int = 1
    max_completion_tokens: int | None = None  # the newer name, which wins
    stream: bool = False
    prompt: list[int] = []

    @property
    def tokens(self) -> int:
        """How many are wanted."""
        return self.max_completion_tokens or self.max_tokens


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


TOKEN = chunk(
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":" a"}]}\n\n'
)
CHAT_TOKEN = chunk(
    b'data: {"id":"cmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":" a"}}]}\n\n'
)
MESSAGE_TOKEN = chunk(
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
    b'"delta":{"type":"text_delta","text":" a"}}\n\n'
)
MESSAGE_END = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'


class Served(asyncio.Protocol):
    """One connection; requests come one after another."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.buffer = engine, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """A stream whose client left stops by itself: its transport is closing."""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        at = head.lower().find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(rest) < length:
            return
        self.buffer = b""
        path = head.split(b" ", 2)[1].decode()
        if path == "/stamps":
            self._whole(msgspec.json.encode(self.engine.stamps), 0)
        elif path == "/v1/models":
            self._whole(b'{"data":[{"id":"m"}]}', 0)
        elif path == "/readyz":
            self.transport.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
        else:
            self._answer(path, msgspec.json.decode(rest, type=Asked))

    def _whole(self, body: bytes, number: int) -> None:
        head = HEAD.format(number, "application/json") + f"content-length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)

    def _answer(self, path: str, asked: Asked) -> None:
        number = len(self.engine.stamps)
        stamps: list[float] = []
        if self.engine.is_stamping:
            self.engine.stamps.append(stamps)
        if asked.stream:
            Stream(self, asked, stamps, path.rsplit("/", 1)[1]).open(number)
        else:
            usage = {"prompt_tokens": len(asked.prompt), "completion_tokens": asked.tokens}
            self._whole(msgspec.json.encode({"choices": [{"text": " a"}], "usage": usage}), number)


class Stream:
    """One answer, a token a step."""

    def __init__(self, served: Served, asked: Asked, stamps: list[float], route: str) -> None:
        self.served, self.asked, self.stamps, self.is_messages = served, asked, stamps, route == "messages"
        self.token = {"messages": MESSAGE_TOKEN, "completions": CHAT_TOKEN}.get(route, TOKEN)

    def open(self, number: int) -> None:
        """The head at once, the first token later."""
        self.served.transport.write((HEAD.format(number, STREAM)).encode().replace(b"\r\n\r\n\r\n", b"\r\n\r\n"))
        self.served.engine.enter(self)

    def step(self) -> None:
        """One token, and the next one later; the end behind the last."""
        if self.served.transport.is_closing():
            self.served.engine.leave()
            return
        self.stamps.append(time.monotonic())
        self.served.transport.write(self.token)
        if len(self.stamps) < self.asked.tokens:
            self.served.engine.after(self.served.engine.pace_s, self.step)
            return
        self.served.transport.write(self._end())
        self.served.engine.leave()

    def _end(self) -> bytes:
        if self.is_messages:
            usage = {"type": "message_delta", "usage": {"input_tokens": 1, "output_tokens": len(self.stamps)}}
            return chunk(b"data: " + msgspec.json.encode(usage) + b"\n\n" + MESSAGE_END) + b"0\r\n\r\n"
        usage = {"prompt_tokens": len(self.asked.prompt), "completion_tokens": len(self.stamps)}
        body = msgspec.json.encode({"choices": [], "usage": usage})
        return chunk(b"data: " + body + b"\n\ndata: [DONE]\n\n") + b"0\r\n\r\n"


class Engine:
    """The pace, and every stamp."""

    def __init__(self, first_s: float, pace_s: float, is_stamping: bool, slots: int) -> None:
        self.first_s, self.pace_s, self.is_stamping = first_s, pace_s, is_stamping
        self.stamps: list[list[float]] = []
        self.free, self.line = slots, deque[Stream]()

    def enter(self, stream: Stream) -> None:
        """Begin this answer, or line up behind those that came before."""
        self.line.append(stream)
        self._admit()

    def leave(self) -> None:
        """An answer ended: the next in line begins."""
        self.free += 1
        self._admit()

    def _admit(self) -> None:
        while self.free and self.line:
            self.free -= 1
            self.after(self.first_s, self.line.popleft().step)

    def after(self, seconds: float, step: asyncio.TimerHandle | object) -> None:
        """Call later, or as soon as others had their turn."""
        loop = asyncio.get_running_loop()
        if seconds > 0:
            loop.call_later(seconds, step)  # type: ignore[arg-type]
        else:
            loop.call_soon(step)  # type: ignore[arg-type]


async def main(port: int, first_s: float, pace_s: float, *flags: str) -> None:
    """Serve until killed."""
    slots = next((int(flag.removeprefix("slots=")) for flag in flags if flag.startswith("slots=")), SLOTS)
    engine = Engine(first_s, pace_s, "stamp" in flags, slots)
    server = await asyncio.get_running_loop().create_server(lambda: Served(engine), "127.0.0.1", port)
    print("ready", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:]))
