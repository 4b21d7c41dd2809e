"""A host pool in virtual time: what the device gave up comes back from it, after as long as the copy takes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from loadgen.cli import main
from loadgen.records import Record
from loadgen.sim.profiles import Profile
from loadgen.traces import Header, Row, Trace, encode
from tests.loadgen.sim.small import SMALL, mix, world


def returning(profile: Profile) -> Record:
    """A session's second turn; between its two, strangers fill the device's memory."""
    session = Row(timestamp=0.0, session_id="s", input_length=4_000, output_length=4, hash_ids=list(range(250)))
    later = Row(delay=25_000.0, session_id="s", input_length=4_016, output_length=4, hash_ids=list(range(251)))
    strangers = [
        Row(timestamp=2_000.0 + 1_500.0 * n, input_length=4_000, output_length=4, hash_ids=[1000 * n + 999])
        for n in range(1, 9)
    ]
    trace = Trace(Header(block_size=16), (session, later, *strangers))
    records = world(trace, profiles=(profile,)).run()
    return next(record for record in records if record.row == 1)


def ttft_s(record: Record) -> float:
    return record.token_s[0] - (record.intended_s or 0.0)


def test_what_the_device_gave_up_comes_back_from_the_host_and_takes_its_time() -> None:
    without = returning(SMALL)
    quick, slow = (
        returning(msgspec.structs.replace(SMALL, host_blocks=4_000, host_block_s=seconds)) for seconds in (1e-5, 1e-3)
    )
    assert (without.cached_tokens or 0) < 1_000
    assert quick.cached_tokens == slow.cached_tokens == 4_000
    restored = 250 - (without.cached_tokens or 0) // 16
    assert ttft_s(slow) - ttft_s(quick) == pytest.approx(restored * (1e-3 - 1e-5), abs=0.02)
    assert ttft_s(quick) < ttft_s(without) / 4


def test_with_a_pool_runs_repeat_and_may_be_fused() -> None:
    profile = msgspec.structs.replace(SMALL, blocks_total=300, host_blocks=2_000, host_block_s=1e-3)
    one, again, single = (world(mix(), profiles=(profile, profile), is_fused=fused) for fused in (True, True, False))
    made = [msgspec.json.encode(each.run()) for each in (one, again, single)]
    assert made[0] == made[1] == made[2]


def test_rates_have_no_pool_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, profile = tmp_path / "t.jsonl", tmp_path / "p.json"
    path.write_bytes(encode(mix(duration_s=5.0)))
    profile.write_bytes(msgspec.json.encode(msgspec.structs.replace(SMALL, host_blocks=64)))
    words = ["simulate", str(path), "--profile", str(profile), "--aggregate", "--out", str(tmp_path / "o")]
    assert main(words) == 1
    assert "no host pool" in capsys.readouterr().err
