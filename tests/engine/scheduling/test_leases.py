"""What a session's KV is kept for is told by its answer: a tool that was called returns soon, a person does not."""

from __future__ import annotations

import msgspec
import pytest

from tests.engine.rig import CHAT, SIZE, Rig, expected, order, prompt

PROMPT = prompt(1, 4 * SIZE)
ANSWER = expected(PROMPT, 2 * SIZE)
STRANGER = max(ANSWER) + 1  # an id that the answer does not have
ASKED = next(number for number in PROMPT.tolist() if number not in ANSWER)


@pytest.mark.parametrize(
    ("call_ids", "is_leased"),
    [
        ([STRANGER, ANSWER[5]], True),
        ([STRANGER], False),
        ([ASKED], False),  # a call in the prompt is an older one
        ([], False),
        (None, True),
    ],
)
def test_a_lease_is_for_who_called_a_tool_or_may_have(call_ids: list[int] | None, is_leased: bool) -> None:
    rig = Rig(blocks=40)
    asked = order(1, PROMPT, session="s", cls=CHAT, max_tokens=len(ANSWER))
    rig.submit(msgspec.structs.replace(asked, call_ids=call_ids))
    rig.run()
    blocks = rig.trie.match(PROMPT.tobytes(), b"", 0)
    assert len(blocks) == 4
    assert [block.lease_until > rig.now for block in blocks] == [is_leased] * 4
