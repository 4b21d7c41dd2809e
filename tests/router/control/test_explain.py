"""explain-class: the evidence for one recorded request, as it was when it was classified."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from policies import plugins
from policies.events import Event, Offered
from policies.request import Facts, Request, RequestId, Tenant
from router.cli import main
from router.control.record import FORMAT, Header, Recorder
from router.control.reducer import build, policy_spec
from router.settings.config import Config


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Four requests of one headless session after one that a person led."""
    path, config = tmp_path / "run.jsonl", Config()
    recorder = Recorder(
        path, Header(FORMAT, 0, "test", 1, msgspec.Raw(config.to_json())), segment_bytes=1 << 20, segments_max=1
    )
    reducer = build(config, plugins.load(policy_spec(config)), 1)
    for number in range(5):
        agent = "claude-cli/2 (external, cli)" if number == 0 else "codex_exec/0.169.0"
        facts = Facts(stream=True, user_agent=agent, has_session=True, message_count=number + 1)
        asked = Request(RequestId(f"{number}abc{number}"), Tenant(), "s1", "tiny", facts, float(number), 100, 20)
        event: Event = Offered(asked)
        recorder.write(float(number), event, reducer.handle(event, float(number)))
    recorder.close()
    return path


def test_it_shows_what_was_said_remembered_and_matched(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain-class", str(recording), "2abc"]) == 0
    said = capsys.readouterr().out
    assert "chatbot+, by headless-agent, not yet" in said
    assert "user_agent = 'codex_exec/0.169.0'" in said
    assert "agreeing = 1" in said
    assert "-> headless-agent" in said
    assert "-> interactive-agent" not in said
    assert "the row says background-agent" in said


def test_three_agreeing_requests_take_urgency(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain-class", str(recording), "3abc3"]) == 0
    assert "background-agent, by headless-agent\n" in capsys.readouterr().out


@pytest.mark.parametrize("request_id", ["9", ""])
def test_an_unknown_or_ambiguous_request_is_an_error(
    recording: Path, request_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain-class", str(recording), request_id]) == 1
    assert "begin with" in capsys.readouterr().err
