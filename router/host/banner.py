"""What `headway serve` prints once it serves: where, how to try it, what is promised, how to stop.

Owns the wording and the question to /readyz. Standard library only, as the keeper that uses it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any

READY_TIMEOUT_S = 0.5  # the listening socket is the keeper's: it accepts before anyone is there to answer
TERMS = (  # title, key of /readyz, key of what each token adds, and of what tokens
    ("first token", "ttft_s", "ttft_s_per_new_token", "new prompt token"),
    ("per output token", "tpot_s", "tpot_s_per_prompt_token", "prompt token"),
    ("whole answer", "deadline_s", "deadline_s_per_new_token", "new prompt token"),
)


def banner(address: Any, admin_port: int, ready: Mapping[str, Any]) -> str:
    """What a person wants to know once it serves: where, how to try it, what is promised, how to stop."""
    host, port = address[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    key = ' -H "authorization: Bearer $KEY"' if ready["needs_key"] else ""
    body = json.dumps({"model": ready["model"], "messages": messages, "temperature": 0})
    lines = [
        "",
        f"Headway serves {ready['model']} at {url}  (dashboard: http://127.0.0.1:{admin_port}/)",
        "",
        f"  curl {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'",
        "",
        "Budgets in force (never tighter than this machine can keep):",
        *(f"  {name:17} {_budget(budget)}" for name, budget in ready["budgets"].items()),
        "",
        "Ctrl-C drains and stops.",
        "",
    ]
    return "\n".join(lines)


def _budget(budget: Mapping[str, float | None]) -> str:
    return ", ".join(filter(None, (_term(budget, *term) for term in TERMS))) or "no promise"


def _term(budget: Mapping[str, float | None], title: str, key: str, slope_key: str, unit: str) -> str:
    if not (value_s := budget.get(key)):
        return ""
    slope_s = budget.get(slope_key) or 0.0
    return f"{title} {_time(value_s)}" + (f" + {_time(slope_s)} per {unit}" if slope_s >= 5e-6 else "")


def _time(seconds: float) -> str:
    """Three digits: what a machine measured in one second differs by more from start to start."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def ask_ready(address: Any) -> dict[str, Any] | None:
    """What the admin listener's /readyz says once it says yes. The socket is ours, so connecting proves nothing yet."""
    connection = http.client.HTTPConnection(address[0], address[1], timeout=READY_TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
        return answer if response.status == 200 and answer["ready"] else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
