"""Prompts have the trace's lengths and share what the trace shares; nothing sent names the true class."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from loadgen.dialects import DIALECTS, Name
from loadgen.prompts import ID_HIGH, ID_LOW, WORDS, Dresser, prompt_ids, words
from loadgen.traces import CLASSES, ClassName, Header, Row, Trace

BLOCK = 16


def row(length: int, *hash_ids: int, session: str = "s", request_class: ClassName = "chatbot+") -> Row:
    return Row(
        timestamp=0,
        session_id=session,
        request_class=request_class,
        user="user-01",
        input_length=length,
        output_length=5,
        hash_ids=list(hash_ids),
    )


def trace(*rows: Row, local: bool = False) -> Trace:
    return Trace(Header(block_size=BLOCK, hash_scope="local" if local else "global"), rows)


@pytest.mark.parametrize(("length", "hash_ids"), [(48, (1, 2, 3)), (40, (1, 2, 3)), (40, (1, 2)), (5, ()), (1, (9,))])
def test_a_prompt_is_exactly_as_long_as_the_trace_says(length: int, hash_ids: tuple[int, ...]) -> None:
    ids = prompt_ids(trace(row(length, *hash_ids)), 0, seed=1)
    assert len(ids) == length
    assert all(ID_LOW <= number < ID_HIGH for number in ids)


def test_equal_blocks_are_equal_tokens_and_the_first_other_block_ends_it() -> None:
    both = trace(row(48, 1, 2, 3), row(64, 1, 2, 7, 3))
    first, second = prompt_ids(both, 0, seed=1), prompt_ids(both, 1, seed=1)
    assert first[:32] == second[:32]
    assert first[32] != second[32]
    assert first[32:48] == second[48:64]


def test_a_longer_prompt_contains_the_shorter_one_to_its_last_named_token() -> None:
    both = trace(row(40, 1, 2, 3), row(48, 1, 2, 3))
    assert prompt_ids(both, 1, seed=1)[:40] == prompt_ids(both, 0, seed=1)


def test_tails_without_a_block_are_the_rows_own() -> None:
    both = trace(row(20, 1), row(20, 1))
    first, second = prompt_ids(both, 0, seed=1), prompt_ids(both, 1, seed=1)
    assert first[:16] == second[:16]
    assert first[16:] != second[16:]


def test_local_ids_of_two_sessions_are_other_text() -> None:
    both = trace(row(16, 1, session="a"), row(16, 1, session="b"), local=True)
    assert prompt_ids(both, 0, seed=1) != prompt_ids(both, 1, seed=1)


def test_another_seed_is_other_text() -> None:
    one = trace(row(16, 1))
    assert prompt_ids(one, 0, seed=1) == prompt_ids(one, 0, seed=1)
    assert prompt_ids(one, 0, seed=1) != prompt_ids(one, 0, seed=2)


@pytest.mark.parametrize("request_class", CLASSES)
@pytest.mark.parametrize("stripped", [0.0, 1.0])
def test_the_true_class_is_never_sent(request_class: ClassName, stripped: float) -> None:
    asked = row(16, 1, session="" if request_class == "data-processor" else "s", request_class=request_class)
    costume = Dresser(stripped, seed=1).costume(asked)
    bodies = [dialect.body(asked, [1000], costume, "m").decode() for dialect in DIALECTS.values()]
    said = json.dumps(costume.headers) + "".join(bodies)
    assert not any(name in said for name in (*CLASSES, "x-headway-class", "service_tier", "user-01"))


def test_each_class_wears_what_a_real_client_of_it_sends() -> None:
    dresser = Dresser(0.0, seed=1)
    chat, agent = (dresser.costume(row(16, 1, request_class=name)) for name in CLASSES[:2])
    job = dresser.costume(row(16, 1, session="", request_class="data-processor"))
    assert "(external, cli)" in chat.headers["user-agent"]
    assert chat.headers["x-claude-code-session-id"]
    assert agent.headers["originator"] == "codex_exec"
    assert job.headers == {"user-agent": "OpenAI/Python 3.54.0"}
    assert (chat.is_stream, agent.is_stream, job.is_stream) == (True, True, False)


def test_a_session_is_stripped_whole_and_about_as_many_as_were_asked_for() -> None:
    dresser = Dresser(0.3, seed=1)
    rows = [row(16, turn, session=f"s{number}") for number in range(400) for turn in (1, 2)]
    stripped = [dresser.is_stripped(one) for one in rows]
    assert stripped[0::2] == stripped[1::2]
    assert 90 < sum(stripped[0::2]) < 150


def test_the_body_forces_the_length_and_asks_for_usage() -> None:
    asked = row(16, 1)
    sent = json.loads(DIALECTS["completions"].body(asked, [1000, 1001], Dresser(0.0, 1).costume(asked), "m"))
    assert sent == {
        "model": "m",
        "prompt": [1000, 1001],
        "max_tokens": 5,
        "min_tokens": 5,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize("name", ["chat", "anthropic"])
def test_dialects_of_text_say_a_word_for_each_id_so_that_equal_blocks_are_equal_text(name: Name) -> None:
    asked = row(48, 1, 2, 3)
    one, two = trace(asked, row(48, 1, 2, 9)).rows, trace(asked, row(48, 1, 2, 9))
    costume = Dresser(0.0, 1).costume(asked)
    bodies = [DIALECTS[name].body(one[index], prompt_ids(two, index, seed=1), costume, "m") for index in (0, 1)]
    first, second = (json.loads(sent)["messages"][0]["content"].split() for sent in bodies)
    assert (len(first), first[:32] == second[:32], first[32:] == second[32:]) == (48, True, False)


def test_a_word_is_one_token_of_the_embedded_model(tokenizer: Tokenizer) -> None:
    assert len(set(WORDS)) == 256
    text = words(list(range(256)))
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 256
