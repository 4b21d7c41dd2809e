"""What `headway serve` prints once it serves: where, how to try it, what is promised, how to stop.

Owns the wording and the question to /readyz. Standard library only, as the keeper that uses it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any

READY_TIMEOUT_S = 0.5  # the listening socket is the keeper's: it accepts before anyone is there to answer
TERMS = (  # title, key of /readyz, factor, unit
    ("first token", "ttft_s", 1.0, "s"),
    ("per new prompt token", "ttft_s_per_new_token", 1000.0, "ms"),
    ("per output token", "tpot_s", 1000.0, "ms"),
    ("whole answer", "deadline_s", 1.0, "s"),
)


def banner(address: Any, admin_port: int, ready: Mapping[str, Any]) -> str:
    """What a person wants to know once it serves: where, how to try it, what is promised, how to stop."""
    host, port = address[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = json.dumps({"model": ready["model"], "messages": messages, "temperature": 0})
    lines = [
        "",
        f"Headway serves {ready['model']} at {url}  (dashboard: http://127.0.0.1:{admin_port}/)",
        "",
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
        "",
        "Budgets in force:",
        *(f"  {name:17} {_budget(budget)}" for name, budget in ready["budgets"].items()),
        "",
        "Ctrl-C drains and stops.",
        "",
    ]
    return "\n".join(lines)


def _budget(budget: Mapping[str, float | None]) -> str:
    parts = [f"{title} {value * factor:.4g} {unit}" for title, key, factor, unit in TERMS if (value := budget.get(key))]
    return ", ".join(parts) or "no promise"


def ask_ready(address: Any) -> dict[str, Any] | None:
    """What /readyz says once it says yes. The socket is ours, so connecting proves nothing yet."""
    connection = http.client.HTTPConnection(address[0], address[1], timeout=READY_TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        answer = response.read()
        return json.loads(answer) if response.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
