"""An answer that a client sends back unchanged is read as the ids that the model gave, whatever its template does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from engine.kv import keys
from engine.kv.keys import Ids
from router.language.echoes import Echoes
from router.language.lineage import Lineages
from router.language.text import Prompt
from router.language.turn import Message, Part, PartKind
from tests.router.desk import MARKS, TOOL_TEMPLATE, Desk, desk, ids_of, run

USER = {"role": "user", "content": "How is Oslo?"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"arguments":{"city":"Oslo"},"name":"weather"}</tool_call>'  # not as the template writes it
NONE = np.zeros(0, dtype=np.int32)
BLOCK_TOKENS = 2
# Strips and asks, as Llama's own templates do.
TRIMMING = TOOL_TEMPLATE.replace("{{ message.content }}", "{{ message.content | trim }}")
# Looks for thoughts in an answer and drops them, as Qwen's do.
DROPPING = TOOL_TEMPLATE.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
# Will not have a tool's result without a call before it.
STRICT = "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}" \
    "{{ raise_exception('no call') }}{% endif %}{% endfor %}" + TOOL_TEMPLATE  # fmt: skip


async def turn(d: Desk, messages: list[dict[str, Any]], said: list[int], **fields: Any) -> tuple[list[int], Any]:
    """The prompt's ids, and what the client is told."""
    body = {"model": "tiny", "messages": messages, "user": "session", **fields}
    asking = asyncio.create_task(d.client.post("/v1/chat/completions", json=body))
    attempt = await d.fleet.next()
    attempt.start()
    for token in said:
        attempt.say([token])
    attempt.end()
    answer = await asking
    assert answer.status_code == 200, answer.text
    return attempt.ids, answer.json()["choices"][0]["message"]


def sent_back(message: dict[str, Any]) -> dict[str, Any]:
    """As SDKs do: what they were given, with JSON of their own."""
    back = {name: message[name] for name in ("role", "content", "tool_calls") if message.get(name)}
    for call in back.get("tool_calls", ()):
        call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), indent=1)
    return back


@pytest.mark.parametrize("template", [TOOL_TEMPLATE, TRIMMING, DROPPING], ids=["plain", "trimming", "dropping"])
@pytest.mark.parametrize("said", ["Fine.", "Let me see. " + CALL, "<think>\nhm\n</think>\n" + CALL + CALL])
def test_the_next_prompt_begins_with_the_last_one_and_its_answer(template: str, said: str) -> None:
    async def work() -> None:
        async with desk(template=template) as d:
            emitted = ids_of(said)
            first, message = await turn(d, [USER], [*emitted, MARKS["end"]], tools=TOOLS)
            result = {"role": "tool", "tool_call_id": "c", "content": "4 degrees"}
            second, _ = await turn(d, [USER, sent_back(message), result], [65], tools=TOOLS)
            assert second[: len(first) + len(emitted)] == first + emitted
            assert [receipt.lost_tokens for receipt in d.receipts] == [None, 0]
            again, _ = await turn(d, [USER, sent_back(message), result], [65], tools=TOOLS)
            assert again == second

    run(work())


def test_an_answer_that_was_changed_is_rendered_anew_and_the_loss_is_counted() -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            first, message = await turn(d, [USER], [*ids_of(CALL), MARKS["end"]], tools=TOOLS)
            back = sent_back(message)
            back["tool_calls"][0]["function"]["arguments"] = '{"city": "Bergen"}'
            second, _ = await turn(d, [USER, back], [65], tools=TOOLS)
            assert second[: len(first)] == first
            written = ids_of('{"city": "Bergen"}')
            assert written in [second[at : at + len(written)] for at in range(len(second))]
            assert d.receipts[-1].lost_tokens > 0

    run(work())


def test_thoughts_before_a_users_next_word_are_dropped_as_the_template_says() -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            said = ids_of("<think>\nhm\n</think>\nFine.")
            first, message = await turn(d, [USER], said)
            second, _ = await turn(d, [USER, sent_back(message), USER], [65])
            assert second[len(first) :][: len(ids_of("Fine."))] == ids_of("Fine.")

    run(work())


def test_a_template_that_will_not_have_it_gets_the_message_as_it_was_sent() -> None:
    async def work() -> None:
        async with desk(template=STRICT) as d:
            _, message = await turn(d, [USER], ids_of(CALL), tools=TOOLS)
            result = {"role": "tool", "tool_call_id": "c", "content": "4 degrees"}
            second, _ = await turn(d, [USER, sent_back(message), result], [65], tools=TOOLS)
            written = ids_of('{"name": "weather", "arguments": {"city": "Oslo"}}')
            assert written in [second[at : at + len(written)] for at in range(len(second))]

    run(work())


def test_another_salt_domain_and_another_text_know_nothing() -> None:
    echoes, message = Echoes(10_000), Message("assistant", "yes")
    echoes.keep(b"a", [Part(PartKind.TEXT, "yes")], "yes", ids(1, 2), ("", NONE))
    assert echoes.recalled(b"a", [message])[0].ids.tolist() == [1, 2]
    assert echoes.recalled(b"b", [message]) == {}
    assert echoes.recalled(b"a", [replace(message, content="yes ")]) == {}
    assert echoes.recalled(b"a", [replace(message, role="user")]) == {}


def ids(*numbers: int) -> Ids:
    return np.array(numbers, dtype=np.int32)


def prompt(*numbers: int) -> Prompt:
    return Prompt(ids(*numbers), keys.chain(keys.root("m"), ids(*numbers), BLOCK_TOKENS))


def test_answers_and_lineages_are_kept_under_a_bound_oldest_out_first() -> None:
    echoes, lineages = Echoes(1000), Lineages(100)
    for number in range(20):
        echoes.keep(b"", [Part(PartKind.TEXT, f"{number}")], f"{number}", ids(number), ("", NONE))
        lineages.keep(b"%d" % number, prompt(*range(3)), ids(3, 4))
    assert 0 < echoes.bytes_held <= 1000
    assert 0 < lineages.bytes_held <= 100
    assert [len(echoes.recalled(b"", [Message("assistant", text)])) for text in ("0", "19")] == [0, 1]
    assert (
        lineages.lost_tokens(b"0", prompt(0), BLOCK_TOKENS),
        lineages.lost_tokens(b"19", prompt(0, 1, 9), BLOCK_TOKENS),
    ) == (None, 3)


@pytest.mark.parametrize(
    ("now", "lost"),
    [
        ((1, 2, 3, 4, 5, 6, 7), 0),
        ((1, 2, 3, 4, 5, 6), 0),
        ((1, 2, 3, 4, 5), 1),
        ((1, 2, 3, 4, 9, 6), 2),
        ((1, 2, 3, 9, 5), 3),
        ((1, 9, 3, 4, 5), 5),
        ((9,), 6),
    ],
)
def test_what_is_lost_stands_behind_the_first_difference(now: Sequence[int], lost: int) -> None:
    lineages = Lineages(1000)
    lineages.keep(b"x", prompt(1, 2, 3, 4, 5), ids(6))
    assert lineages.lost_tokens(b"x", prompt(*now), BLOCK_TOKENS) == lost
