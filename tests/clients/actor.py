"""A model that is a script, for agents: it calls their tool when it is told to, sums up when they compact, else greets.

Owns a worker process without weights behind the real wire, scheduler and prefix cache (engine/fake.py), with as much
context as is said. Run: python -m tests.clients.actor --socket S --tokenizer FOLDER --context N"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from engine import build, fake
from engine.compute.masks import Grammar
from engine.config import EngineConfig
from engine.kv.keys import Ids
from engine.step import Int32, ModelFacts
from tests.clients.tiny_agent import SENTENCE

BLOCK_TOKENS, BLOCKS = 16, 16_384
RUN, FILL = "Run your tool", "Fill your context"  # what a person says who wants the one command or the other
PROOF = "proof-42"  # what only a shell makes of the command
COMMANDS = {RUN: "echo proof-$((40 + 2))", FILL: "seq 1 2000"}
SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"  # how mini-swe-agent is told that all is done
SUMS_UP = ("summary of the conversation", "CONTEXT CHECKPOINT", "continuing our conversation", "anchored summary")
SUMMARY = "<summary>They said hello, and all was well.</summary>"
# The shells of agents: a sign in their prompt, the tool's name, and its arguments around the command.
SHELLS = {
    '"name": "Bash"': ("Bash", {"command": "", "description": "Says it"}),
    '"name": "exec_command"': ("exec_command", {"cmd": ""}),
    '"name": "shell_command"': ("shell_command", {"command": ""}),
    '"name": "bash"': ("bash", {"command": "", "description": "Says it"}),
}


class Actor:
    """Prompt to answer, as ids. It is asked once a token, and thinks once a prompt."""

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self._tokenizer, self._end = tokenizer, end
        self._answers: dict[bytes, Ids] = {}

    def __call__(self, prompt: Ids) -> Ids:
        key = prompt[-4096:].tobytes()
        if key not in self._answers:
            said = answer(self._tokenizer.decode(prompt.tolist(), skip_special_tokens=False))
            ids = self._tokenizer.encode(said, add_special_tokens=False).ids
            self._answers[key] = np.array([*ids, self._end], dtype=np.int32)
        return self._answers[key]


def answer(prompt: str) -> str:
    """What it says to a rendered prompt of ChatML."""
    spoken = [part.partition("\n") for part in prompt.split("<|im_start|>")[1:-1]]
    role, content = next((role, content) for role, _, content in reversed(spoken) if role != "system")
    if role == "tool":
        is_swe = SUBMIT.split()[1] in prompt and PROOF in content
        return call(prompt, SUBMIT) if is_swe else f"{SENTENCE} {PROOF}" if PROOF in content else SENTENCE
    if any(words in content for words in SUMS_UP):
        return SUMMARY
    wish = next((command for words, command in COMMANDS.items() if words in content), None)
    return SENTENCE if wish is None else call(prompt, wish)


def call(prompt: str, command: str) -> str:
    """A call of the shell that this agent offers; its sentence where it offers none."""
    shell = next((shell for sign, shell in SHELLS.items() if sign in prompt), None)
    if shell is None:
        return SENTENCE
    name, fields = shell
    arguments = {field: text or command for field, text in fields.items()}
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Free:
    """engine.compute.masks.Grammar of a model that keeps to its script: any token may come."""

    def __init__(self, mask_words: int) -> None:
        self.mask_words = mask_words

    def fill(self, mask: Int32) -> None:
        mask[:] = -1

    def accept(self, token: int) -> None:
        del token


def free(words: int) -> Callable[[str, str], Grammar]:
    """Compiles any grammar to none."""
    return lambda *_: Free(words)


def main() -> int:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--name", default="w0")
    parser.add_argument("--model-name", default="tiny")
    parser.add_argument("--calibrate-s", type=float, default=0.2)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder that has one for ChatML")
    parser.add_argument("--context", type=int, default=131_072)
    said = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(said.tokenizer / "tokenizer.json"))
    end, vocab_size = tokenizer.token_to_id("<|im_end|>"), tokenizer.get_vocab_size()
    facts = ModelFacts("tiny", "actor", "fake", "ids", vocab_size, said.context, (end,))
    config = EngineConfig(said.socket, said.name, model_name=said.model_name, calibrate_s=said.calibrate_s)
    actor = Actor(tokenizer, end)
    runner = fake.FakeRunner(facts, (BLOCKS, BLOCK_TOKENS), fake.speed(1.0), time.sleep, says=actor)
    return build.serve(runner, facts, config, compile=free(-(-vocab_size // 32)))


if __name__ == "__main__":
    sys.exit(main())
