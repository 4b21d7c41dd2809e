"""Tenants: keys are digests in a file that is followed; each tenant has its bounds, its models and its own cache."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from policies.request import RequestClass, Tenant
from router.access import keys
from router.access.accounts import Accounts
from router.access.keys import KeyFile, KeyRow, KeysError, TenantRow
from router.access.salts import Salts
from router.access.tenants import Tenants
from router.cli import main
from router.errors import RequestError
from tests.router.desk import VIEW, Desk, chat, desk, run, speak
from tests.router.telemetry.test_metrics import receipt

NOVEMBER_END = 1795996799.0  # 2026-11-29 23:59:59 UTC
DAY_S = 86400.0


class Clock:
    """Both clocks of a test."""

    def __init__(self) -> None:
        self.now = 100.0

    def wall(self) -> float:
        return NOVEMBER_END + self.now - 100.0

    def __call__(self) -> float:
        return self.now


def tenants_of(path: Path, clock: Callable[[], float] | None = None) -> Tenants:
    ticking = clock or Clock()
    assert isinstance(ticking, Clock)
    accounts = Accounts(path.with_name("usage.json"), ticking, ticking.wall)
    accounts.load()
    built = Tenants(path, Salts(b"s" * 32), Tenant(), accounts)
    built.load()
    return built


def made(path: Path, name: str = "alice", models: tuple[str, ...] = (), **changes: Any) -> str:
    return keys.add(path, name, changes, models, "2026-11-22")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def by_desk(path: Path, work: Callable[[Desk, Tenants], Any], clock: Clock | None = None) -> None:
    async def scene() -> None:
        built = tenants_of(path, clock)
        async with desk(tenants=built) as d:
            d.fleet.answer = speak("ok")
            await work(d, built)

    run(scene())


# The file -------------------------------------------------------------------------------------------------------------


def test_the_file_holds_digests_alone_and_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.json"

    key = made(path)

    assert key.startswith("hw-")
    assert len(key) > 40
    assert key.removeprefix("hw-") not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_is_revoked_by_the_beginning_of_its_id_and_its_tenant_stays(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, other = made(path), made(path, weight=2.0)

    keys.revoke(path, keys.digest(key)[:8])

    file = keys.read(path)
    assert file is not None
    assert [row.digest for row in file.keys] == [keys.digest(other)]
    assert file.tenants["alice"].weight == 2.0


@pytest.mark.parametrize("key_id", ["", "zz", "0123456789ab"])
def test_what_names_no_key_or_several_revokes_nothing(tmp_path: Path, key_id: str) -> None:
    path = tmp_path / "keys.json"
    made(path)

    with pytest.raises(KeysError, match="keys begin with"):
        keys.revoke(path, key_id)


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[]",
        b'{"keys": [{"digest": "short", "tenant": "a"}]}',
        b'{"keys": [], "extra": 1}',
        b'{"tenants": {"a b": {"organisation": "x"}}}',
        b'{"tenants": {"a": {"organisation": "x", "most_urgent": "king"}}}',
        b'{"tenants": {"a": {"organisation": "x", "weight": 0}}}',
        b'{"tenants": {"a": {"organisation": "x", "concurrency": 0}}}',
        b'{"tenants":' * 100_000,
    ],
)
def test_a_file_that_is_wrong_is_refused_whole(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(KeysError):
        keys.parse(tmp_path, data)


def test_a_key_of_nobody_and_a_key_twice_are_refused(tmp_path: Path) -> None:
    row = KeyRow("0" * 64, "alice")

    with pytest.raises(KeysError, match="of tenant alice, who is not there"):
        keys.parse(tmp_path, msgspec.json.encode(KeyFile({}, (row,))))
    with pytest.raises(KeysError, match="twice"):
        keys.parse(tmp_path, msgspec.json.encode(KeyFile({"alice": TenantRow("alice")}, (row, row))))


def test_more_keys_than_the_bound_and_a_larger_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.json"
    made(path)
    monkeypatch.setattr(keys, "KEYS_MAX", 1)
    with pytest.raises(KeysError, match="2 keys, more than the 1"):
        made(path)
    monkeypatch.setattr(keys, "FILE_MAX_BYTES", 10)
    with pytest.raises(KeysError, match="more than the 10 bytes"):
        keys.read(path)


def test_a_tenants_name_may_go_into_headers_and_logs(tmp_path: Path) -> None:
    for name in ("", "a b", "a\nb", "é", "-a", "a" * 65):
        with pytest.raises(KeysError, match="a tenant's name"):
            made(tmp_path / "keys.json", name)


# Keys at work ---------------------------------------------------------------------------------------------------------


def test_a_request_is_its_keys_tenants_in_the_tenants_own_cache(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    alice = made(path, "alice", organisation="acme", most_urgent="background-agent", weight=3.0)
    bob = made(path, "bob", organisation="acme")
    eve = made(path, "eve")
    pal = made(path, "pal", salt_domain="eve")

    async def work(d: Desk, _: Tenants) -> None:
        salts = []
        for key in (alice, bob, eve, pal):
            answer = await d.client.post("/v1/chat/completions", json=chat(), headers={"x-api-key": key})
            assert answer.status_code == 200
            salts.append((await d.fleet.next()).order.salt)
        assert d.mind.offered[0].tenant == Tenant("alice", "acme", RequestClass.BACKGROUND_AGENT, 3.0)
        assert salts[0] == salts[1]
        assert salts[2] == salts[3]
        assert salts[0] != salts[2]

    by_desk(path, work)


def test_a_router_follows_its_keys_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.json"
    caplog.set_level(logging.INFO)

    async def work(d: Desk, tenants: Tenants) -> None:
        async def status(key: str) -> int:
            tenants.reload()
            return (await d.client.get("/v1/models", headers=bearer(key))).status_code

        assert await status("nothing") == 200  # this machine, and nobody made a key yet
        first, second = made(path), made(path)
        assert (await status(first), await status(second), await status("nothing")) == (200, 200, 401)
        keys.revoke(path, keys.digest(first)[:12])
        assert (await status(first), await status(second)) == (401, 200)
        path.write_bytes(b"{")
        assert await status(second) == 200  # a broken file changes nothing, and is told once
        path.unlink()
        assert (await status(second), await status("nothing")) == (200, 401)

    by_desk(path, work)
    assert [record.message.startswith("the keys before stay") for record in caplog.records if record.levelno > 20] == [
        True,
        True,
    ]


def test_keys_without_any_left_lock_everybody_out(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys.revoke(path, keys.digest(made(path))[:12])

    async def work(d: Desk, _: Tenants) -> None:
        assert (await d.client.get("/v1/models")).status_code == 401

    by_desk(path, work)


def test_a_key_for_some_models_sees_no_other(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = made(path, models=("ti*",))

    async def work(d: Desk, _: Tenants) -> None:
        d.fleet.views["secret"] = VIEW
        d.client.headers.update(bearer(key))
        listed = (await d.client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["tiny"]
        forbidden = await d.client.post("/v1/chat/completions", json=chat(model="secret"))
        missing = await d.client.post("/v1/chat/completions", json=chat(model="nobody"))
        assert (forbidden.status_code, forbidden.json()) == (missing.status_code, missing.json())
        assert (await d.client.get("/v1/models/secret")).status_code == 404
        assert (await d.client.post("/v1/chat/completions", json=chat())).status_code == 200

    by_desk(path, work)


def test_probes_need_no_key_and_tell_nothing_without_one(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = made(path)

    async def work(d: Desk, _: Tenants) -> None:
        assert (await d.client.get("/readyz")).json() == {"ready": True}
        assert (await d.client.get("/readyz", headers=bearer(key))).json() == {"ready": True, "workers": 1}
        assert (await d.client.get("/livez")).status_code == 200

    by_desk(path, work)


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_a_rate_is_kept_and_the_refusal_says_when(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    key, other = made(path, requests_per_min=2), made(path, "bob")

    async def work(d: Desk, _: Tenants) -> None:
        async def ask(who: str) -> Any:
            return await d.client.post("/v1/chat/completions", json=chat(), headers=bearer(who))

        assert [(await ask(key)).status_code for _ in range(2)] == [200, 200]
        refused = await ask(key)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "30"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert (await ask(other)).status_code == 200
        clock.now += 30.0
        assert [(await ask(key)).status_code for _ in range(2)] == [200, 429]

    by_desk(path, work, clock)


def test_so_many_requests_run_at_one_time_and_an_ended_one_makes_room(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = made(path, concurrency=1)

    async def work(d: Desk, _: Tenants) -> None:
        d.fleet.answer = None
        first = asyncio.create_task(d.client.post("/v1/chat/completions", json=chat(), headers=bearer(key)))
        attempt = await d.fleet.next()
        refused = await d.client.post("/v1/messages", json=chat(max_tokens=5), headers=bearer(key))
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "1"
        speak("ok")(attempt)
        assert (await first).status_code == 200
        d.fleet.answer = speak("ok")
        assert (await d.client.post("/v1/chat/completions", json=chat(), headers=bearer(key))).status_code == 200
        bad = [await d.client.post("/v1/chat/completions", content=b"{", headers=bearer(key)) for _ in range(3)]
        assert [answer.status_code for answer in bad] == [400] * 3  # who was refused holds no place

    by_desk(path, work)


@pytest.mark.parametrize("bound", ["tokens_per_month", "gpu_s_per_month"])
def test_a_months_budget_ends_and_begins_again_with_the_month(tmp_path: Path, bound: str) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    made(path, **{bound: 20})
    tenants = tenants_of(path, clock)
    (caller,) = (tenants._callers or {}).values()

    def visit() -> None:
        with tenants.visit(caller):
            pass

    visit()
    tenants.accounts.ended(receipt(tenant="alice", attempts=1, prompt_tokens=15, output_tokens=5, gpu_s=20.0))
    with pytest.raises(RequestError) as refused:
        visit()
    assert refused.value.status == 429
    assert (b"x-should-retry", b"false") in refused.value.headers()
    assert refused.value.retry_after_s == DAY_S + 1
    clock.now += DAY_S + 1
    visit()


def test_what_was_taken_survives_a_restart_within_its_month(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    tenants = tenants_of(path, clock)
    tenants.accounts.ended(receipt(tenant="alice", attempts=1, prompt_tokens=15, output_tokens=5, gpu_s=0.5))
    tenants.accounts.save()

    assert tenants_of(path, clock).accounts.of("alice").tokens == 20
    assert tenants_of(path, clock).accounts.of("alice").gpu_s == 0.5
    clock.now += 2 * DAY_S
    assert tenants_of(path, clock).accounts.of("alice").tokens == 0


def test_routers_of_one_state_folder_add_up(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, second = tenants_of(path).accounts, tenants_of(path).accounts
    for accounts, tokens in ((first, 10), (second, 3), (first, 1)):
        accounts.ended(receipt(tenant="alice", attempts=1, prompt_tokens=tokens, output_tokens=0, gpu_s=0.5))
        accounts.save()

    assert (first.of("alice").tokens, second.of("alice").tokens) == (14, 13)
    assert tenants_of(path).accounts.of("alice").gpu_s == 1.5


def test_a_request_that_reached_no_worker_costs_no_tokens(tmp_path: Path) -> None:
    accounts = tenants_of(tmp_path / "keys.json").accounts

    accounts.ended(receipt(tenant="alice", attempts=0, prompt_tokens=15, output_tokens=0))

    assert accounts.of("alice").tokens == 0


def test_a_broken_record_of_use_counts_from_zero_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "usage.json").write_bytes(b"\xff")

    assert tenants_of(tmp_path / "keys.json").accounts.of("alice").tokens == 0
    assert "cannot be read" in caplog.text


def test_accounts_of_those_who_left_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.access.accounts.IDLE_ACCOUNTS_MAX", 3)
    accounts = tenants_of(tmp_path / "keys.json").accounts
    busy = accounts.enter("busy", TenantRow("busy"))

    for name in "abcd":
        accounts.of(name)

    assert len(accounts.shown()) <= 3
    assert accounts.of("busy") is busy


# The command line -----------------------------------------------------------------------------------------------------


def test_the_command_adds_lists_and_revokes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADWAY_SERVER_KEYS_FILE", str(tmp_path / "keys.json"))
    monkeypatch.chdir(tmp_path)

    assert main(["keys", "list"]) == 0
    assert "does not exist" in capsys.readouterr().out
    assert main(["keys", "add", "bob", "--organisation", "acme", "--requests-per-min", "60", "--model", "qwen*"]) == 0
    key = capsys.readouterr().out.strip()
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert "bob: organisation acme" in listed
    assert "requests-per-min 60" in listed
    assert f"{keys.digest(key)[:12]}" in listed
    assert key not in listed
    assert main(["keys", "revoke", keys.digest(key)[:6]]) == 0
    assert main(["keys", "revoke", keys.digest(key)[:6]]) == 1
    assert json.loads((tmp_path / "keys.json").read_text())["keys"] == []


def test_a_bad_bound_is_explained_and_makes_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADWAY_SERVER_KEYS_FILE", str(tmp_path / "keys.json"))
    monkeypatch.chdir(tmp_path)

    bad = ("--weight=-1", "--class=king", "--tokens-per-month=many", "--concurrency=0.5", "--requests-per-min=nan")
    for flag in bad:
        with pytest.raises(SystemExit, match="2"):
            main(["keys", "add", "bob", flag])
        assert f"argument {flag.partition('=')[0]}: " in capsys.readouterr().err
    assert main(["keys", "add", "bob", "--organisation", "a b"]) == 1

    assert not (tmp_path / "keys.json").exists()
    assert "an organisation's name is 1 to 64 letters" in capsys.readouterr().err


def test_who_can_be_reached_by_others_needs_keys_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.json"
    monkeypatch.setenv("HEADWAY_SERVER_KEYS_FILE", str(path))
    monkeypatch.setenv("HEADWAY_SERVER_HOST", "0.0.0.0")
    monkeypatch.chdir(tmp_path)
    words = f"server.host: 0.0.0.0 can be reached by others, and there are no keys in {path}: make one with"

    assert (main(["check-config"]), main(["serve"])) == (1, 2)
    assert capsys.readouterr().err.count(words) == 2
    key = made(path)
    assert main(["check-config"]) == 0
    keys.revoke(path, keys.digest(key)[:12])
    assert main(["check-config"]) == 1
