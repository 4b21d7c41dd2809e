"""Through a front proxy: docs/examples as they stand, but for TLS, before a real router's door."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from router.access import keys
from tests.ports import reserved_port
from tests.router.access.test_tenants import tenants_of
from tests.router.desk import DEADLINE_S, Attempt, Desk, chat, desk, ids_of, run, speak
from tests.wire.test_framing import REFUSED, SMUGGLED

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
NGINX_FRAME = """
daemon off; {user} pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    {server}
}}
"""
CADDY_FRAME = """{{
    admin off
    auto_https off
    grace_period 1s
    storage file_system {folder}
}}
{server}
"""
PROXIES = [
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed"))
    for name in ("nginx", "caddy")
]


def nginx(folder: Path, port: int, router: int) -> tuple[str, ...]:
    """Its example without TLS, and the command that serves it."""
    text = (EXAMPLES / "nginx.conf").read_text()
    text = re.sub(r"^\s*(http2|ssl_certificate\w*) .*\n", "", text, flags=re.MULTILINE)
    text = text.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};").replace("127.0.0.1:8080", f"127.0.0.1:{router}")
    user = "user root;" if os.geteuid() == 0 else ""  # its worker writes bodies to the test's folder
    (folder / "nginx.conf").write_text(NGINX_FRAME.format(user=user, folder=folder, server=text))
    return ("nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"))


def caddy(folder: Path, port: int, router: int) -> tuple[str, ...]:
    """The same of Caddy's."""
    text = (EXAMPLES / "Caddyfile").read_text()
    text = text.replace("models.example {", f"http://models.example:{port} {{\n\tbind 127.0.0.1")
    text = text.replace("127.0.0.1:8080", f"127.0.0.1:{router}")
    (folder / "Caddyfile").write_text(CADDY_FRAME.format(folder=folder, server=text))
    return ("caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile"))


@contextlib.asynccontextmanager
async def behind(proxy: str, folder: Path) -> AsyncIterator[tuple[Desk, httpx.AsyncClient, tuple[str, int]]]:
    path = folder / "keys.json"
    key = keys.add(path, "alice", {}, (), "")
    with reserved_port() as port:
        async with desk(tenants=tenants_of(path)) as d, served(proxy, folder, port, d.address[1]):
            headers = {"authorization": f"Bearer {key}", "host": f"models.example:{port}"}
            url = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=DEADLINE_S) as client:
                await answering(client)
                yield d, client, ("127.0.0.1", port)


@contextlib.asynccontextmanager
async def served(proxy: str, folder: Path, port: int, router: int) -> AsyncIterator[None]:
    """The proxy's process, on this port before that of the router."""
    command = (nginx if proxy == "nginx" else caddy)(folder, port, router)
    env = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    running = await asyncio.create_subprocess_exec(*command, stdout=DEVNULL, stderr=DEVNULL, env=env)
    try:
        yield
    finally:
        running.terminate()
        async with asyncio.timeout(DEADLINE_S):
            await running.wait()


async def answering(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(httpx.TransportError):
                assert (await client.get("/livez")).status_code == 200
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("proxy", PROXIES)
def test_events_leave_one_by_one_and_a_client_that_leaves_is_seen(tmp_path: Path, proxy: str) -> None:
    async def work() -> None:
        async with behind(proxy, tmp_path) as (d, client, _):
            body = chat(stream=True)
            beginning = asyncio.create_task(begun(d))  # the head comes with the first token
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                pieces, attempt = answer.aiter_text(), await beginning
                for letter in "abc":  # each is read before the next is said
                    if letter != "a":
                        attempt.say(ids_of(letter))
                    said = ""
                    while f'"{letter}"' not in said:
                        said += await anext(pieces)
                assert not attempt.aborted
            await d.until(lambda: bool(attempt.aborted))
            assert d.receipts[-1].outcome == "cancelled"

    run(work())


async def begun(d: Desk) -> Attempt:
    attempt = await d.fleet.next()
    attempt.start()
    attempt.say(ids_of("a"))
    return attempt


@pytest.mark.parametrize("proxy", PROXIES)
def test_bodies_headers_and_refusals_pass(tmp_path: Path, proxy: str) -> None:
    async def work() -> None:
        async with behind(proxy, tmp_path) as (d, client, _):
            d.fleet.answer = speak("ok")
            large = chat(metadata={"padding": "x" * 7 * 2**20})
            headers = {"session_id": "a-session-of-codex"}
            assert (await client.post("/v1/chat/completions", json=large, headers=headers)).status_code == 200
            assert d.mind.offered[-1].session == "a-session-of-codex"
            too_large = b"x" * (34 * 2**20)
            with contextlib.suppress(httpx.ReadError, httpx.WriteError):  # Caddy cuts who goes on sending
                assert (await client.post("/v1/messages", content=too_large)).status_code == 413
            assert len(d.mind.offered) == 1
            anonymous = await client.post("/v1/chat/completions", json=chat(), headers={"authorization": ""})
            assert anonymous.status_code == 401
            refused = await client.post("/v1/chat/completions", content=b"{")
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_json")

    run(work())


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.parametrize("sent", [vector for vector in REFUSED.values() if SMUGGLED in vector])
def test_no_doubtful_bytes_become_a_second_request(tmp_path: Path, sent: bytes) -> None:
    async def work() -> None:
        async with behind("nginx", tmp_path) as (d, client, address):
            key = client.headers["authorization"].encode()
            keyed = sent.replace(b"host: localhost\r\n", b"host: localhost\r\nauthorization: " + key + b"\r\n")
            reader, writer = await asyncio.open_connection(*address)
            writer.write(keyed)
            writer.write_eof()
            async with asyncio.timeout(DEADLINE_S):
                answer = await reader.read(-1)
            writer.close()
            assert b'"object":"list"' not in answer  # what the smuggled request would have got
            assert not d.mind.offered

    run(work())
