"""Step samples are added to those of the same card and never to another's."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.step_samples import begun


def test_samples_are_added_to_those_of_the_same_card(tmp_path: Path) -> None:
    path, head = tmp_path / "samples.jsonl", '{"device": "a", "model": "m", "kv_blocks": 9}'

    assert begun(path, head) == 0
    path.write_text(path.read_text() + "[1, 2, 3, 4, 0.5]\n[1, 2, 3, 4, 0.6]\n")
    assert begun(path, head) == 2
    assert begun(path, '{"device": "a", "model": "m", "kv_blocks": 8}') == 2

    assert begun(path, '{"device": "b", "model": "m"}') == 0
    assert path.read_text() == '{"device": "b", "model": "m"}\n'


def test_a_file_cut_off_inside_a_line_begins_anew(tmp_path: Path) -> None:
    path, head = tmp_path / "samples.jsonl", '{"device": "a", "model": "m"}'
    path.write_text(head + "\n[1, 2, 3, 4, 0.5]\n[1, 2")

    assert begun(path, head) == 0
