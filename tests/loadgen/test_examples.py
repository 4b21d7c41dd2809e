"""Every example of the help does what it says when it is pasted; only ports are the test's own."""

from __future__ import annotations

import argparse
import io
import json
import shlex
import tarfile
from pathlib import Path

import pytest
import zstandard

from loadgen import records
from loadgen.cli import main, parser
from tests.loadgen.conftest import serve_command
from tests.loadgen.fixture import RUN, TWENTY

ROWS = [
    {"timestamp": 20 * number, "input_length": 1200, "output_length": 2, "hash_ids": [0, 1, number], "user": "u"}
    for number in range(5)
]
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
WEKA = (
    "trace,thread,in,out,blocks,lcp_blocks_prev,seen_prefix_blocks,api_time,think_time,input_types\n"
    + "".join(f"s{number},0,130,9,3,0,0,2.0,,text\n" for number in range(200))
)  # fmt: skip
SESSION = {
    "id": "one",
    "block_size": 64,
    "hash_id_scope": "local",
    "requests": [{"t": 0.0, "type": "n", "in": 64, "out": 9, "hash_ids": [1]}],
}


def examples() -> list[str]:
    """Of every command's help, in the order of the commands."""
    (commands,) = (one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    texts = [parser().epilog or "", *(command.epilog or "" for command in commands.choices.values())]
    found = [line.strip() for text in texts for line in text.splitlines()]
    return list(dict.fromkeys(line for line in found if line.startswith("headway-loadgen ") and "COMMAND" not in line))


def test_every_command_has_an_example() -> None:
    (commands,) = (one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    shown = {shlex.split(line)[1] for line in examples()}
    assert shown == set(commands.choices)


def archive(path: Path, **members: str) -> None:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    path.write_bytes(zstandard.compress(plain.getvalue()))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small stand-ins under the names of the public files."""
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name, text in (("conversation_trace.jsonl", lines * 20), ("weka_requests.csv", WEKA)):
        (tmp_path / f"{name}.zst").write_bytes(zstandard.compress(text.encode()))
    (tmp_path / "AzureLLMInferenceTrace_code.csv.zst").write_bytes(zstandard.compress(AZURE.encode()))
    archive(tmp_path / "weka-kv-cache-tester-traces.tar.zst", **{"t/one.json": json.dumps(SESSION)})
    lengths = {"0": {"input_tokens": "{100: 1.0}", "output_tokens": "{7: 1.0}"}}
    rates = {"chunk-0-trace.csv": "39600,2.0,1.0,Gamma,1.0,0.5\n", "chunk-0-dataset.json": json.dumps(lengths)}
    archive(tmp_path / "servegen-data.tar.zst", **{f"reason/deepseek-r1/{name}": rates[name] for name in rates})
    (tmp_path / "workload.toml").write_text("[chat]\nsessions_per_s = 0.02\n")
    return tmp_path


def test_the_examples_run_as_pasted(folder: Path, url: str, free_port: int) -> None:
    failed = {}
    for line in examples():
        if shlex.split(line)[1] not in ("compose", "convert"):  # short ones instead of those that compose made
            (folder / "mix.jsonl").write_text('{"trace": 1, "block_size": 512}\n' + "".join(map(_line, ROWS)))
            records.write(RUN, TWENTY, folder / "out" / "replay.jsonl")
        command = line.replace("http://127.0.0.1:8080", url).replace("127.0.0.1:8080", url.removeprefix("http://"))
        command = command.replace("127.0.0.1:9000", f"127.0.0.1:{free_port}").replace("--listen 9999", "--listen 0")
        words = [
            serve_command(folder, free_port) if word.startswith("headway serve") else word
            for word in shlex.split(command)[1:]
        ]
        if main(words) != 0:
            failed[line] = words
    assert failed == {}


def _line(row: dict[str, object]) -> str:
    return json.dumps(row) + "\n"
