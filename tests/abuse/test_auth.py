"""The auth table: every route of the door, against everything that somebody without a good key may try."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from starlette.routing import Route

from router.access import keys
from router.listener.app import App
from tests.router.access.test_tenants import tenants_of
from tests.router.desk import DEADLINE_S, Desk, chat, desk, run, speak

# Every route and whether it needs a key. A route that is not here fails the test below.
TABLE = {
    "/": False,
    "/livez": False,
    "/readyz": False,
    "/health": False,
    "/openapi.json": True,
    "/v1/responses": True,
    "/v1/models": True,
    "/v1/models/{model:path}": True,
    "/v1/chat/completions": True,
    "/v1/completions": True,
    "/v1/messages": True,
    "/v1/messages/count_tokens": True,
    "/v1/kv_hints": True,
}
GUARDED = [path.replace("{model:path}", "tiny") for path, is_guarded in TABLE.items() if is_guarded]
NOWHERE = (
    "//v1/models",
    "/v1//models",
    "/v1/models/../models",
    "/livez/../v1/models",
    "/livez/",
    "/livez;/v1/models",
    "/%6civez",
    "/v1%2fmodels",
    "/v1/models%00",
    "/V1/models",
    "/admin",
    "/metrics",
    "/v1/nothing",
)
POSTS = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/responses",
    "/v1/kv_hints",
}


def bad_credentials(key: str) -> dict[str, list[bytes]]:
    good = key.encode()
    return {
        "none": [],
        "empty bearer": [b"authorization: Bearer "],
        "empty header": [b"authorization: "],
        "empty x-api-key": [b"x-api-key: "],
        "wrong": [b"authorization: Bearer hw-" + b"x" * 43],
        "wrong x-api-key": [b"x-api-key: hw-" + b"x" * 43],
        "prefix": [b"authorization: Bearer " + good[:-1]],
        "suffix": [b"authorization: Bearer " + good + b"x"],
        "case": [b"authorization: Bearer " + good.swapcase()],
        "its digest": [b"authorization: Bearer " + keys.digest(key).encode()],
        "very long": [b"authorization: Bearer " + b"x" * 20_000],
        "basic": [b"authorization: Basic " + good],
        "bare": [b"authorization: " + good],
        "two in one": [b"authorization: Bearer wrong, Bearer " + good],
        "bearer twice": [b"authorization: Bearer Bearer " + good],
        "one good, one bad": [b"authorization: Bearer " + good, b"x-api-key: wrong"],
        "cookie": [b"cookie: key=" + good],
        "elsewhere": [b"api-key: " + good],
        "proxy": [b"proxy-authorization: Bearer " + good],
        "forwarded": [b"x-forwarded-for: 127.0.0.1", b"x-forwarded-host: localhost"],
        "odd bytes": [b"authorization: Bearer \xff\xfe" + good],
        "sql": [b"authorization: Bearer ' or '1'='1"],
    }


CASES = tuple(bad_credentials("k"))
OVERRIDES = [b"x-http-method-override: GET", b"x-original-url: /livez", b"x-rewrite-url: /livez"]


def request(path: str, lines: list[bytes], method: str = "", host: bytes = b"localhost") -> bytes:
    method = method or ("POST" if path in POSTS else "GET")
    head = [f"{method} {path} HTTP/1.1".encode(), b"host: " + host, *lines]
    body = b'{"model": "tiny", "messages": [], "prompt": "x"}' if method == "POST" else b""
    return b"\r\n".join([*head, b"connection: close", b"content-length: %d" % len(body), b"", body])


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_the_table_lists_every_route(tmp_path: Path) -> None:
    async def work() -> None:
        async with desk(tenants=tenants_of(tmp_path / "keys.json")) as d:
            app = d.listener.handle.__self__  # type: ignore[attr-defined]
            assert isinstance(app, App)
            routes = [route.path for route in app._routes.routes if isinstance(route, Route)]
            assert sorted([*app._posts, *routes]) == sorted(TABLE)

    run(work())


@pytest.mark.parametrize("case", CASES)
def test_without_a_good_key_nothing_guarded_answers(tmp_path: Path, case: str) -> None:
    path = tmp_path / "keys.json"
    key = keys.add(path, "alice", {}, (), "")

    async def work() -> None:
        async with desk(tenants=tenants_of(path)) as d:
            for guarded in (*GUARDED, *NOWHERE):
                answer = await d.raw(request(guarded, bad_credentials(key)[case] + OVERRIDES))
                assert status(answer) == 401, guarded
                assert b"www-authenticate: Bearer" in answer
                assert key.encode() not in answer
                assert len(answer) < 1200
            assert not d.mind.offered

    run(work())


def test_hints_reach_the_sessions_of_their_own_tenant_alone(tmp_path: Path) -> None:
    async def work() -> None:
        path = tmp_path / "keys.json"
        alice, bob = keys.add(path, "alice", {}, (), "2026-11-22"), keys.add(path, "bob", {}, (), "2026-11-22")
        tenants = tenants_of(path)
        async with desk(tenants=tenants) as d:
            for key in (alice, bob, alice):
                answer = await d.client.post(
                    "/v1/kv_hints", content=b"hint", headers={"authorization": f"Bearer {key}"}
                )
                assert (answer.status_code, answer.json()["message_id"]) == (200, "m")
            assert (await d.client.post("/v1/kv_hints", content=b"hint")).status_code == 401
            spoilt = {"authorization": f"Bearer {bob}"}
            assert (await d.client.post("/v1/kv_hints", content=b"{}", headers=spoilt)).status_code == 400
            assert (await d.client.get("/v1/kv_hints", headers=spoilt)).status_code == 405
            salts = [salt for _, salt in d.hints.asked]
            assert salts[0] == salts[2] != salts[1]
            assert None not in salts

    run(work())


@pytest.mark.parametrize("lines", [2, 3])
def test_two_keys_of_one_kind_are_no_request(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "keys.json"
    good = b"authorization: Bearer " + keys.add(path, "alice", {}, (), "").encode()

    async def work() -> None:
        async with desk(tenants=tenants_of(path)) as d:
            assert status(await d.raw(request("/v1/models", [good] * lines))) == 400
            assert status(await d.raw(request("/v1/models", [b"authorization: Bearer x", good]))) == 400

    run(work())


def test_a_good_key_opens_what_is_there_in_either_header_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = keys.add(path, "alice", {}, (), "").encode()
    ways = [[b"authorization: Bearer " + key], [b"x-api-key: " + key]]
    ways += [[b"Authorization: bEaReR  " + key], [ways[0][0], ways[1][0]]]

    async def work() -> None:
        async with desk(tenants=tenants_of(path)) as d:
            for way in ways:
                assert status(await d.raw(request("/v1/models", way, host=b"models.example"))) == 200
                for nowhere in NOWHERE:
                    assert status(await d.raw(request(nowhere, way))) == 404, nowhere
            for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "GET"):
                assert status(await d.raw(request("/v1/chat/completions", ways[0], method))) == 405

    run(work())


def test_who_has_no_key_is_refused_before_the_body_is_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys.add(path, "alice", {}, (), "")
    head = b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 30000000\r\n\r\n"

    async def work() -> None:
        async with desk(tenants=tenants_of(path)) as d:
            answer = await d.raw(head)  # and not a byte of the body
            assert status(answer) == 401
            assert b'"type":"error"' in answer.replace(b" ", b"")  # in the dialect of the route
            assert b"connection: close" in answer

    run(work())


@pytest.mark.parametrize("host", [b"evil.example", b"127.0.0.1.evil.example", b"10.0.0.1", b"localhost.evil", b"[::2]"])
def test_a_server_without_keys_refuses_names_that_are_not_its_own(host: bytes) -> None:
    async def work() -> None:
        async with desk() as d:
            for path in TABLE:
                assert status(await d.raw(request(path.replace("{model:path}", "tiny"), [], host=host))) == 403, path

    run(work())


@pytest.mark.parametrize(
    "origin",
    [b"https://evil.example", b"null", b"http://localhost.evil.example", b"file://", b"http://[", b"http://[x]"],
)
def test_a_server_without_keys_refuses_foreign_pages(origin: bytes) -> None:
    async def work() -> None:
        async with desk() as d:
            for path in TABLE:
                answer = await d.raw(request(path.replace("{model:path}", "tiny"), [b"origin: " + origin]))
                assert status(answer) == 403, path

    run(work())


def test_no_page_is_allowed_across_origins(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = keys.add(path, "alice", {}, (), "").encode()
    asks = [b"origin: https://evil.example", b"access-control-request-method: POST"]

    async def work() -> None:
        async with desk(tenants=tenants_of(path)) as d:
            d.fleet.answer = speak("ok")
            preflight = await d.raw(request("/v1/chat/completions", asks, "OPTIONS"))
            answer = await d.raw(request("/v1/models", [*asks, b"x-api-key: " + key]))
            assert status(preflight) == 401
            assert b"access-control" not in (preflight + answer).lower()

    run(work())


def test_a_key_that_is_revoked_between_head_and_body_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = keys.add(path, "alice", {}, (), "")

    async def work() -> None:
        tenants = tenants_of(path)
        async with desk(tenants=tenants) as d:
            body = str(chat()).replace("'", '"').encode()
            reader, writer = await asyncio.open_connection(*d.address)
            fields = b"x-api-key: %b\r\ncontent-length: %d" % (key.encode(), len(body))
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n" + fields + b"\r\n\r\n")
            await until_connected(d)
            keys.revoke(path, keys.digest(key)[:12])
            tenants.reload()
            writer.write(body)
            async with asyncio.timeout(DEADLINE_S):
                assert b" 401 " in await reader.readline()
            writer.close()
            assert not d.mind.offered

    run(work())


async def until_connected(d: Desk) -> None:
    await d.until(lambda: any(connection._head is not None for connection in d.listener._connections))
