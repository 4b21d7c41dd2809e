"""A keeper on a stage: real processes, but the children are a few lines of Python each.

Owns the stand-in router (it is always ready) and worker. Run as `python -m tests.router.stage DIRECTORY CHANGES`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from router.host.keeper import Keeper, Plan

NOTE = "import os, sys; open(os.path.join(os.environ['STAGE'], sys.argv[1]), 'a').write(f'{os.getpid()}\\n');"
WORKER = NOTE + "import time; time.sleep(3600)"
ROUTER = (
    NOTE
    + """
import http.server, json, os, signal, socket, sys, threading
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/stall":
            os.write(int(flags["--keeper-fd"]), b"w0\\n")
        if self.path == "/garble":
            os.write(int(flags["--keeper-fd"]), b"w0=77\\n")
        budgets = {"chatbot+": {"ttft_s": 1.5}}
        state = {"ready": True, "workers": 1, "model": "tiny", "budgets": budgets, "needs_key": False}
        body = json.dumps(state).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
def serve(flag):
    server = http.server.HTTPServer(("127.0.0.1", 0), Ready, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=int(flags[flag]))
    server.serve_forever()
threading.Thread(target=serve, args=("--admin-fd",), daemon=True).start()
serve("--listen-fd")
"""
)
DEAF_ROUTER = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + ROUTER


def main() -> int:
    directory, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
    python = (sys.executable, "-c")
    commands = {
        "prepare": ["print('progress'); print('/model')"],
        "worker": [WORKER, "w0"],
        "router": [ROUTER, "router"],
    }
    commands |= changes.get("commands", {})
    plan = Plan(
        host="127.0.0.1",
        port=changes.get("port", 0),
        admin_port=0,
        drain_grace_s=changes.get("drain_grace_s", 10.0),
        config=b"{}",
        prepare=(*python, *commands["prepare"]),
        workers={"w0": (*python, *commands["worker"])},
        router=(*python, *commands["router"]),
        env={**os.environ, "STAGE": str(directory)},
    )
    return Keeper(plan).run()


if __name__ == "__main__":
    sys.exit(main())
