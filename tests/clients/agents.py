"""The agents that `make clients` runs: how each is installed, told where Headway is, and asked something.

Owns their command lines and settings as docs/clients.md gives them. Starts none."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field

MODEL = "tiny"
OPENCODE = {
    "provider": {
        "headway": {
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": "@URL@/v1", "apiKey": "none"},
            "models": {MODEL: {"limit": {"context": 131072, "output": 8192}}},
        }
    },
    "model": f"headway/{MODEL}",
    "small_model": f"headway/{MODEL}",
}
CODEX = f"""model = "{MODEL}"
model_provider = "headway"
model_context_window = @CONTEXT@
model_auto_compact_token_limit = @COMPACT@
[model_providers.headway]
name = "Headway"
base_url = "@URL@/v1"
wire_api = "responses"
"""
LLM = f"""- model_id: {MODEL}
  model_name: {MODEL}
  api_base: "@URL@/v1"
"""
# Its first start asks for a theme, the key and trust in the folder; a person answers once, this file always.
CLAUDE = {
    "hasCompletedOnboarding": True,
    "theme": "dark",
    "customApiKeyResponses": {"approved": ["none"], "rejected": []},
    "projects": {"@HOME@/work": {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}},
}


@dataclass(frozen=True, slots=True)
class Agent:
    """One client. `@URL@`, `@BIN@`, `@HOME@`, `@CONTEXT@`, `@COMPACT@` and `@SAY@` are filled in."""

    name: str
    install: tuple[str, ...]
    asks: tuple[str, ...]  # in a new session; empty: its screen alone is used
    goes_on: tuple[str, ...] = ()  # in the last one; empty: it cannot without a terminal
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # below HOME or, from `work/` on, where it runs
    screen: tuple[str, ...] = ()  # of an agent that is used in a terminal
    has_tool: bool = False
    talks: bool = True  # it takes an answer without a call
    compacts: bool = False


def npm(package: str) -> tuple[str, ...]:
    return ("npm", "install", "--no-audit", "--no-fund", "--prefix", "@BIN@", package)


def pip(package: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pip", "install", "-q", "--target", f"@BIN@/{package}", package)


NODE = "@BIN@/node_modules/.bin/"
CLAUDE_ENV = {
    "ANTHROPIC_BASE_URL": "@URL@",
    "ANTHROPIC_API_KEY": "none",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
}
OPENAI_ENV = {"OPENAI_API_BASE": "@URL@/v1", "OPENAI_API_KEY": "none"}
CODEX_FLAGS = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
AIDER = f"--model openai/{MODEL} --no-git --yes --no-show-model-warnings --no-check-update --analytics-disable"
AIDER += " --chat-history-file .chat --input-history-file .input"  # else it writes beside the .git above
SWE = f"-m minisweagent.run.mini -m openai/{MODEL} -y --exit-immediately -l 0 -t"
AGENTS = (
    Agent(
        "claude-code",
        npm("@anthropic-ai/claude-code"),
        (NODE + "claude", "-p", "@SAY@", "--allowedTools", "Bash"),
        (NODE + "claude", "--continue", "-p", "@SAY@", "--allowedTools", "Bash"),
        CLAUDE_ENV,
        has_tool=True,
        compacts=True,
    ),
    Agent(
        "claude-code-screen",
        npm("@anthropic-ai/claude-code"),
        (),
        env=CLAUDE_ENV,
        files={".claude.json": json.dumps(CLAUDE)},
        screen=(NODE + "claude", "--allowedTools", "Bash"),
        has_tool=True,
    ),
    Agent(
        "codex",
        npm("@openai/codex"),
        (NODE + "codex", "exec", *CODEX_FLAGS, "@SAY@"),
        (NODE + "codex", "exec", "resume", "--last", *CODEX_FLAGS, "@SAY@"),
        files={".codex/config.toml": CODEX},
        has_tool=True,
        compacts=True,
    ),
    Agent(
        "opencode",
        npm("opencode-ai"),
        (NODE + "opencode", "run", "@SAY@"),
        (NODE + "opencode", "run", "--continue", "@SAY@"),
        files={"work/opencode.json": json.dumps(OPENCODE)},
        has_tool=True,
        compacts=True,
    ),
    Agent(
        "aider",
        pip("aider-chat"),
        (sys.executable, "-m", "aider", *AIDER.split(), "--message", "@SAY@"),
        env=OPENAI_ENV | {"PYTHONPATH": "@BIN@/aider-chat"},
    ),
    Agent(
        "mini-swe-agent",
        pip("mini-swe-agent"),
        (sys.executable, *SWE.split(), "@SAY@"),
        env=OPENAI_ENV
        | {"PYTHONPATH": "@BIN@/mini-swe-agent", "MSWEA_CONFIGURED": "true", "MSWEA_COST_TRACKING": "ignore_errors"},
        has_tool=True,
        talks=False,
    ),
    Agent(
        "llm",
        pip("llm"),
        (sys.executable, "-m", "llm", "-m", MODEL, "@SAY@"),
        (sys.executable, "-m", "llm", "-m", MODEL, "-c", "@SAY@"),
        env={
            "OPENAI_API_KEY": "none",
            "PYTHONPATH": "@BIN@/llm",
            "LLM_USER_PATH": "@HOME@",
            "LLM_LOAD_PLUGINS": "",  # the embedded model's package is one, and needs what is not installed
        },
        files={"extra-openai-models.yaml": LLM},
    ),
)
