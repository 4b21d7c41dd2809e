"""An httpx transport over our own connections, whose pool survives cancellation; Headway's httpx clients use it.

httpx 0.28's own pool loses a slot for each request that is cancelled between assignment and connect (encode/httpx
#3782): after some dozens of them nothing is ever answered again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx

from router.errors import Headers
from router.upstreams.http1 import Call, Origin, Pool

REPLY_BYTES_MAX = 8 * 1024 * 1024  # health, models, metrics: vLLM's metrics are about 60 KiB


class Transport(httpx.AsyncBaseTransport):
    """Small requests and whole replies: the streams of clients do not pass here."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises httpx.TransportError."""
        body = await request.aread()
        line = b"%b %b HTTP/1.1\r\n" % (request.method.encode(), request.url.raw_path)
        head = b"".join(b"%b: %b\r\n" % field for field in request.headers.raw)
        reply = _Reply()
        call = Call(self._pool, Origin.of(str(request.url.copy_with(query=None))), line + head + b"\r\n" + body, reply)
        reply.abort = call.abort
        seconds = request.extensions.get("timeout", {}).get("read")
        try:
            async with asyncio.timeout(seconds):
                await reply.over
        except TimeoutError:
            raise httpx.ReadTimeout("no whole reply in time", request=request) from None
        finally:
            call.abort()
        return httpx.Response(reply.status, headers=reply.headers, content=b"".join(reply.body))


def _nothing() -> None:
    """Before there is a call to abort."""


class _Reply:
    """Collects a reply; `over` ends with it."""

    def __init__(self) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.headers: Headers = []
        self.body: list[bytes] = []
        self.abort: Callable[[], None] = _nothing
        self._bytes = 0

    def head(self, status: int, headers: Headers) -> None:
        self.status = status
        # The body is as long as it came; a coding that nobody asked for stays what it is.
        self.headers = [field for field in headers if field[0] not in (b"transfer-encoding", b"content-encoding")]

    def data(self, data: bytes) -> None:
        self._bytes += len(data)
        self.body.append(data)
        if self._bytes > REPLY_BYTES_MAX:
            self.abort()
            self.failed(f"a reply of more than {REPLY_BYTES_MAX} bytes")

    def end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def failed(self, reason: str) -> None:
        if not self.over.done():
            self.over.set_exception(httpx.ReadError(reason))
