"""Through a front proxy: docs/examples/nginx.conf as it stands, but for TLS, before a real router's door."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from router.access import keys
from tests.router.access.test_tenants import tenants_of
from tests.router.desk import Desk, chat, desk, run, speak
from tests.wire.test_framing import REFUSED, SMUGGLED

NGINX = shutil.which("nginx")
EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "nginx.conf"
FRAME = """
daemon off; {user} pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    {server}
}}
"""

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def without_tls(text: str, port: int, router: int) -> str:
    text = re.sub(r"^\s*(http2|ssl_certificate\w*) .*\n", "", text, flags=re.MULTILINE)
    return text.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};").replace("127.0.0.1:8080", f"127.0.0.1:{router}")


@contextlib.asynccontextmanager
async def behind_nginx(folder: Path) -> AsyncIterator[tuple[Desk, httpx.AsyncClient, tuple[str, int]]]:
    path = folder / "keys.json"
    key = keys.add(path, "alice", {}, (), "")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    user = "user root;" if os.geteuid() == 0 else ""  # its worker writes bodies to the test's folder
    async with desk(tenants=tenants_of(path)) as d:
        (folder / "nginx.conf").write_text(
            FRAME.format(user=user, folder=folder, server=without_tls(EXAMPLE.read_text(), port, d.address[1]))
        )
        assert NGINX is not None
        command = (NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"))
        proxy = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=STDOUT)
        headers = {"authorization": f"Bearer {key}", "host": "models.example"}
        url = f"http://127.0.0.1:{port}"
        try:
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as client:
                await answering(client)
                yield d, client, ("127.0.0.1", port)
        finally:
            proxy.terminate()
            async with asyncio.timeout(20):
                await proxy.wait()


async def answering(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(httpx.TransportError):
                assert (await client.get("/livez")).status_code == 200
                return
            await asyncio.sleep(0.02)


def test_events_leave_one_by_one_and_a_client_that_leaves_is_seen(tmp_path: Path) -> None:
    async def work() -> None:
        async with behind_nginx(tmp_path) as (d, client, _):
            body = chat(stream=True)
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                pieces = answer.aiter_text()
                asking = asyncio.create_task(d.fleet.next())
                attempt = await asking
                attempt.start()
                for letter in "abc":  # each is read before the next is said
                    attempt.say([ord(letter) - ord("a") + token_of_a()])
                    said = ""
                    while f'"{letter}"' not in said:
                        said += await anext(pieces)
                assert not attempt.aborted
            await d.until(lambda: bool(attempt.aborted))
            assert d.receipts[-1].outcome == "cancelled"

    run(work())


def token_of_a() -> int:
    from tests.router.desk import ids_of

    return ids_of("a")[0]


def test_bodies_headers_and_refusals_pass(tmp_path: Path) -> None:
    async def work() -> None:
        async with behind_nginx(tmp_path) as (d, client, _):
            d.fleet.answer = speak("ok")
            large = chat(metadata={"padding": "x" * 7 * 2**20})
            headers = {"session_id": "a-session-of-codex"}
            assert (await client.post("/v1/chat/completions", json=large, headers=headers)).status_code == 200
            assert d.mind.offered[-1].session == "a-session-of-codex"
            too_large = b"x" * (34 * 2**20)
            assert (await client.post("/v1/messages", content=too_large)).status_code == 413
            anonymous = await client.post("/v1/chat/completions", json=chat(), headers={"authorization": ""})
            assert anonymous.status_code == 401
            refused = await client.post("/v1/chat/completions", content=b"{")
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_json")

    run(work())


@pytest.mark.parametrize("sent", [vector for vector in REFUSED.values() if SMUGGLED in vector])
def test_no_doubtful_bytes_become_a_second_request(tmp_path: Path, sent: bytes) -> None:
    async def work() -> None:
        async with behind_nginx(tmp_path) as (d, client, address):
            key = client.headers["authorization"].encode()
            keyed = sent.replace(b"host: localhost\r\n", b"host: localhost\r\nauthorization: " + key + b"\r\n")
            reader, writer = await asyncio.open_connection(*address)
            writer.write(keyed)
            writer.write_eof()
            async with asyncio.timeout(20):
                answer = await reader.read(-1)
            writer.close()
            assert b'"object":"list"' not in answer  # what the smuggled request would have got
            assert not d.mind.offered

    run(work())
