"""What an engine holds of our prompts, as far as its own events tell."""

from __future__ import annotations

from policies.request import WorkerId
from router.upstreams.residence import Residence

W0, W1 = WorkerId(0), WorkerId(1)


def chain(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(16, "big") for number in numbers)


def held(*prompts: tuple[WorkerId, bytes], blocks: int) -> Residence:
    """An engine to which prompts went, and which stored so many blocks of 16 tokens for them."""
    residence = Residence(tokens_a_key=64)
    for worker, keys in prompts:
        residence.sent(worker, keys)
    assert residence.stored(range(blocks), 16) == {}
    return residence


def test_nothing_is_forgotten_before_the_engine_drops_something() -> None:
    residence = held((W0, chain(1, 2, 3)), blocks=4)  # it holds a third of what we count
    assert (residence.resident_tokens, residence.believed_tokens) == (64, 192)


def test_what_it_drops_is_the_end_of_the_oldest_prompt() -> None:
    residence = held((W0, chain(1, 2, 3)), (W0, chain(1, 9)), blocks=16)
    assert residence.removed([0, 1, 2, 3]) == {W0: chain(3)}
    assert residence.removed([4, 5, 6, 7]) == {W0: chain(2)}
    assert residence.removed([8, 9, 10, 11]) == {W0: chain(9)}
    assert (residence.resident_tokens, residence.believed_tokens) == (64, 64)


def test_a_prompt_that_is_sent_again_is_young_again() -> None:
    residence = held((W0, chain(1)), (W1, chain(2)), (W0, chain(1)), blocks=8)
    assert residence.removed([0, 1, 2, 3]) == {W1: chain(2)}


def test_blocks_from_before_we_listened_change_nothing() -> None:
    residence = held((W0, chain(1)), blocks=4)
    assert residence.removed([b"old", 77]) == {}
    assert residence.stored([1], 16) == {}  # told twice, counted once
    assert residence.resident_tokens == 64


def test_a_cleared_cache_holds_nothing_of_anybody() -> None:
    residence = held((W0, chain(1)), (W1, chain(2)), blocks=8)
    assert residence.cleared() == {W0: chain(1), W1: chain(2)}
    assert (residence.resident_tokens, residence.believed_tokens) == (0, 0)


def test_both_sides_are_bounded() -> None:
    residence = Residence(64, blocks_max=4, keys_max=2)
    residence.sent(W0, chain(1, 2, 3))
    assert residence.believed_tokens == 128
    assert residence.stored(range(5), 16) == {W0: chain(2, 1)}
    assert residence.resident_tokens == 0
