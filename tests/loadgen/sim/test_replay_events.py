"""What the simulator's dispatcher saw and said is a recording like any other: it replays byte for byte."""

from __future__ import annotations

from pathlib import Path

import msgspec

from loadgen.sim.script import Failure
from policies.limits import Limits
from router.control.record import FORMAT, Header, Recorder
from router.control.replay import replay
from router.settings.config import Config
from tests.loadgen.sim.small import mix, world


def test_a_simulated_event_log_replays_byte_for_byte(tmp_path: Path) -> None:
    path, config = tmp_path / "events.jsonl", Config()
    header = Header(FORMAT, 0, "test", 1, msgspec.Raw(config.to_json()))
    recorder = Recorder(path, header, segment_bytes=1 << 30, segments_max=1)
    limits = msgspec.structs.asdict(config.limits)
    simulated = world(mix(), recorder, limits=Limits(**limits), failures=(Failure("kill", 0, 12.0, 5.0),))
    simulated.run()
    recorder.close()
    outcome = replay(path)
    assert outcome.difference is None
    assert outcome.events > len(simulated.records)
