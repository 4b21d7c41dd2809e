"""A fake engine for the judge's bench: answers every dialect at a fixed pace and stamps each token as it sends it.

Owns one port and the stamps, by request number (also the answer's x-headway-worker). Never computes anything."""

# python -m bench.fake_engine PORT FIRST_S PACE_S [stamp]: prints "ready PORT"; GET /stamps gives all send times.

from __future__ import annotations

import asyncio
import sys
import time
from typing import cast

import msgspec
import uvloop

HEAD = "HTTP/1.1 200 OK\r\nx-headway-worker: {}\r\ncontent-type: {}\r\n"
STREAM = "text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Asked(msgspec.Struct):
    """What matters of a body."""

    max_tokens: int = 1
    stream: bool = False
    prompt: list[int] = []


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


TOKEN = chunk(
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":" a"}]}\n\n'
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
            Stream(self, asked, stamps, path.endswith("/messages")).open(number)
        else:
            usage = {"prompt_tokens": len(asked.prompt), "completion_tokens": asked.max_tokens}
            self._whole(msgspec.json.encode({"choices": [{"text": " a"}], "usage": usage}), number)


class Stream:
    """One answer, a token a step."""

    def __init__(self, served: Served, asked: Asked, stamps: list[float], is_messages: bool) -> None:
        self.served, self.asked, self.stamps, self.is_messages = served, asked, stamps, is_messages

    def open(self, number: int) -> None:
        """The head at once, the first token later."""
        self.served.transport.write((HEAD.format(number, STREAM)).encode().replace(b"\r\n\r\n\r\n", b"\r\n\r\n"))
        self.served.engine.after(self.served.engine.first_s, self.step)

    def step(self) -> None:
        """One token, and the next one later; the end behind the last."""
        if self.served.transport.is_closing():
            return
        self.stamps.append(time.monotonic())
        self.served.transport.write(MESSAGE_TOKEN if self.is_messages else TOKEN)
        if len(self.stamps) < self.asked.max_tokens:
            self.served.engine.after(self.served.engine.pace_s, self.step)
            return
        self.served.transport.write(self._end())

    def _end(self) -> bytes:
        if self.is_messages:
            usage = {"type": "message_delta", "usage": {"input_tokens": 1, "output_tokens": len(self.stamps)}}
            return chunk(b"data: " + msgspec.json.encode(usage) + b"\n\n" + MESSAGE_END) + b"0\r\n\r\n"
        usage = {"prompt_tokens": len(self.asked.prompt), "completion_tokens": len(self.stamps)}
        body = msgspec.json.encode({"choices": [], "usage": usage})
        return chunk(b"data: " + body + b"\n\ndata: [DONE]\n\n") + b"0\r\n\r\n"


class Engine:
    """The pace, and every stamp."""

    def __init__(self, first_s: float, pace_s: float, is_stamping: bool) -> None:
        self.first_s, self.pace_s, self.is_stamping = first_s, pace_s, is_stamping
        self.stamps: list[list[float]] = []

    def after(self, seconds: float, step: asyncio.TimerHandle | object) -> None:
        """Call later, or as soon as others had their turn."""
        loop = asyncio.get_running_loop()
        if seconds > 0:
            loop.call_later(seconds, step)  # type: ignore[arg-type]
        else:
            loop.call_soon(step)  # type: ignore[arg-type]


async def main(port: int, first_s: float, pace_s: float, is_stamping: bool) -> None:
    """Serve until killed."""
    engine = Engine(first_s, pace_s, is_stamping)
    server = await asyncio.get_running_loop().create_server(lambda: Served(engine), "127.0.0.1", port)
    print("ready", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), "stamp" in sys.argv))
