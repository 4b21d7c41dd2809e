"""What Python itself costs between a client's socket and a worker's link: no mind, no text, no bounds, fixed events.

The baseline of bench/router.py: what the router costs beyond this row is what its duties cost.
Run: python -m bench.bare_router PORT SOCKET,SOCKET"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable
from typing import cast

import httptools
import msgspec
import uvloop

from engine.wire import PROTOCOL_VERSION, FrameReader, Hello, Sampling, Submit, Welcome, decode_from_worker, encode

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1,"model":"mock","choices":[{"index":0,'
    b'"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}\n\n'
)
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class Ask(msgspec.Struct):
    max_tokens: int = 16
    stream: bool = False


ask = msgspec.json.Decoder(Ask).decode


class Link(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self._sinks: dict[int, tuple[asyncio.Transport, bool]] = {}
        self._handles = itertools.count(1)
        self._reader = FrameReader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def submit(self, client: asyncio.Transport, wanted: Ask) -> None:
        handle = next(self._handles)
        self._sinks[handle] = (client, wanted.stream)
        sampling = Sampling(max_tokens=wanted.max_tokens)
        self.transport.write(encode(Submit(handle, b"\0" * 64, 16, b"", 0, 0, 1.0, 0.04, 1.0, str(handle), sampling)))

    def data_received(self, data: bytes) -> None:
        for frame in self._reader.feed(data):
            message = decode_from_worker(frame)
            if isinstance(message, Hello):
                self.transport.write(encode(Welcome(PROTOCOL_VERSION, "bare", "", b"")))
                continue
            for handle in message.handles:
                client, is_stream = self._sinks[handle]
                if is_stream and not client.is_closing():
                    client.write(CHUNK)
            for end in message.ends:
                client, is_stream = self._sinks.pop(end.handle)
                if not client.is_closing():
                    client.write(DONE if is_stream else WHOLE)


class Front(asyncio.Protocol):
    def __init__(self, next_link: Callable[[], Link]) -> None:
        self._next_link = next_link
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        body = b"".join(self._body)
        self._body.clear()
        if not body:
            self._transport.write(WHOLE)
            return
        wanted = ask(body)
        if wanted.stream:
            self._transport.write(HEAD)
        self._next_link().submit(self._transport, wanted)


async def main(port: int, sockets: list[str]) -> None:
    loop = asyncio.get_running_loop()
    links = [(await loop.create_unix_connection(Link, path))[1] for path in sockets]
    ring = itertools.cycle(links)
    server = await loop.create_server(lambda: Front(lambda: next(ring)), "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2].split(",")))
