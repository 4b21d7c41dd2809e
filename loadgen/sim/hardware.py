"""Hardware: which cards and models there are step times of: files that `bench/step_samples.py` wrote on the card.

Owns the names: a card is called by the one word of its device's name that tells it from others. Never guesses memory: a
file that does not say how much KV fits is used only for a card and a model whose sizes are known here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadgen.sim import profiles
from loadgen.sim.profiles import H100_8B_OWN, Profile, StepSample, fitted

RESULTS = Path(__file__).parents[2] / "bench" / "results"  # of a checkout; a wheel has what is built in
PATTERN = "step_samples-*.jsonl"
BUILT_IN = {("h100", "llama-8b"): H100_8B_OWN}  # fitted once to the file of this pair, which a test compares

GIB = 1 << 30
MEMORY_GIB = {"a100": 80, "h100": 80, "h200": 141, "b200": 180}
USABLE = 0.847  # of it: the 432k tokens of KV that an H100 was seen to hold beside the 8B shape


@dataclass(frozen=True, slots=True)
class Model:
    """What a model takes of a card's memory."""

    weight_bytes: float
    token_bytes: int  # of KV
    context_max: int


MODELS = {"llama-8b": Model(16.1e9, 131_072, 131_072)}


class _Head(msgspec.Struct, frozen=True):
    """A file's first line."""

    device: str
    model: str
    block_tokens: int = 64
    kv_blocks: int = 0  # 0: not told
    context_max: int = 0


def table(folder: Path) -> dict[tuple[str, str], Path | Profile]:
    """Every card and model that a plan may be made for. What is built in goes before a file."""
    found: dict[tuple[str, str], Path | Profile] = {}
    for path in sorted(folder.glob(PATTERN)):
        head = _head(path, path.read_bytes().partition(b"\n")[0])
        found[card_of(head.device), head.model] = path
    return found | BUILT_IN


def load(card: str, model: str, folder: Path | None = None) -> Profile:
    """The profile of a card with a model. Raises ValueError saying which there are."""
    known = table(folder or RESULTS)
    if (card, model) not in known:
        pairs = ", ".join(f"{card} with {model}" for card, model in sorted(known))
        raise ValueError(f"no step times of {card} with {model}: there are {pairs}; bench/step_samples.py times others")
    found = known[card, model]
    return found if isinstance(found, Profile) else read(found)


def named(name: str) -> Profile:
    """A profile by its name, from its JSON, or from a file of samples. Raises ValueError saying what is wrong."""
    return read(Path(name)) if name.endswith(".jsonl") else profiles.load(name)


def read(path: Path) -> Profile:
    """A file of samples as a profile. Raises ValueError saying what is wrong with it."""
    first, *lines = path.read_bytes().splitlines()
    head = _head(path, first)
    try:
        steps = [_sample(msgspec.json.decode(line, type=tuple[int, int, int, int, float])) for line in lines]
        theta, sigma = fitted(steps)
    except (msgspec.DecodeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    card = card_of(head.device)
    return Profile(
        name=f"{head.model}-{card}",
        source=f"{head.model} on one {head.device}, fitted to {len(steps):,} timed steps of Headway's own engine",
        theta=theta,
        sigma=sigma,
        block_tokens=head.block_tokens,
        blocks_total=head.kv_blocks or _blocks(path, card, head),
        context_max=head.context_max or _known(path, head).context_max,
    )


def card_of(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` is h100: the first word with a letter before a digit, or else the first with a digit."""
    words = re.split(r"[^a-z0-9]+", device.lower())
    named = [word for word in words if re.match(r"[a-z]+\d", word)] or [
        word for word in words if re.search(r"\d", word)
    ]
    return (named or words)[0]


def _head(path: Path, line: bytes) -> _Head:
    try:
        return msgspec.json.decode(line, type=_Head)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: line 1: {error}") from error


def _sample(values: tuple[int, int, int, int, float]) -> StepSample:
    rows, decode_context, chunk_context, sequences, seconds = values
    return StepSample(rows, seconds, decode_context, chunk_context, sequences)


def _known(path: Path, head: _Head) -> Model:
    if head.model not in MODELS:
        raise ValueError(f"{path}: line 1 has no kv_blocks and no context_max, and {head.model} is not known here")
    return MODELS[head.model]


def _blocks(path: Path, card: str, head: _Head) -> int:
    """From the card's memory, where a file from before does not tell."""
    model = _known(path, head)
    if card not in MEMORY_GIB:
        raise ValueError(f"{path}: line 1 has no kv_blocks, and the memory of {head.device!r} is not known here")
    return int((USABLE * MEMORY_GIB[card] * GIB - model.weight_bytes) / model.token_bytes / head.block_tokens)
