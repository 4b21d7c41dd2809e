"""Profiles: how fast a simulated worker steps and how much it holds, from published figures or from timed steps.

Owns the built-in profile and the file format. Never claims more than its source: a profile says where it is from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from policies.costs import StepFeatures, StepFit, StepModel

PASSES = 20  # over the samples of a file, until the fit has settled
SIGMA_MAX = 1.0
Z90 = 1.2816

Count = Annotated[int, msgspec.Meta(ge=1)]
Number = Annotated[float, msgspec.Meta(ge=0)]


class Theta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The coefficients of policies.costs.StepModel, in seconds."""

    floor_s: Number
    row_s: Number
    base_s: Number
    decode_context_s: Number
    chunk_context_s: Number
    sequence_s: Number


class StepSample(msgspec.Struct, frozen=True):
    """One timed step."""

    rows: Count
    seconds: Annotated[float, msgspec.Meta(gt=0)]
    decode_context: int = 0
    chunk_context: int = 0
    sequences: int = 1


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of worker."""

    name: str
    source: str = ""
    theta: Theta
    sigma: Annotated[float, msgspec.Meta(ge=0, le=SIGMA_MAX)] = 0.05  # of the logarithm of actual / predicted
    block_tokens: Count = 64
    blocks_total: Count
    context_max: Count
    sequences_max: Count = 256
    host_blocks: Annotated[int, msgspec.Meta(ge=0)] = 0  # of a pool in the host's memory; 0: none
    host_block_s: Number = 0.0  # to bring one of them up

    @property
    def model(self) -> StepModel:
        """What this worker publishes of itself: the truth in the median, and how far it strays."""
        return StepModel(**msgspec.structs.asdict(self.theta), q90=math.exp(Z90 * self.sigma), version=1)


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """A profile as a file: coefficients, or the samples that they are fitted to."""

    name: str
    source: str = ""
    theta: Theta | None = None
    samples: list[StepSample] = []
    sigma: float | None = None
    block_tokens: Count = 64
    blocks_total: Count
    context_max: Count
    sequences_max: Count = 256
    host_blocks: Annotated[int, msgspec.Meta(ge=0)] = 0
    host_block_s: Number = 0.0


# Fitted by hand to what vLLM 0.26.0 needs on one H100 80GB with the 8B shape of Llama 3.1 (bf16), measured 22 Nov 2026:
# TPOT 6.49 / 6.94 / 7.76 / 8.74 / 11.01 / 15.99 ms at batch 1 / 8 / 32 / 64 / 128 / 256 and context 576, and about 45,
# 204 and 1,190 ms for prompts of 2k, 8k and 32k once its offline API's 14 ms are taken off. The fit is within 3 %.
H100_8B = Profile(
    name="8b-h100",
    source="8B shape on one H100, fitted to vLLM 0.26.0's measured steps",
    theta=Theta(5.8e-3, 2.11e-5, 6.5e-4, 5.2e-8, 9.3e-10, 7e-6),
    blocks_total=6_750,  # 432k tokens of KV, as vLLM had at 0.88 of the memory
    context_max=131_072,
)
# The same shape in Headway's own engine: StepFit over the 3,354 timed steps of step_samples-llama-8b-h100.jsonl.
# Half are within 5 %, four fifths within -8 and +19 %; the slowest hundredth took over 2.4 times as long as predicted.
H100_8B_OWN = Profile(
    name="8b-h100-headway",
    source="8B shape on one H100, fitted to 3,354 timed steps of Headway's own engine",
    theta=Theta(5.44e-4, 1.7e-5, 5.75e-3, 4.88e-8, 1.257e-9, 7.75e-6),
    sigma=0.14,  # of the p90
    blocks_total=6_750,  # what the engine takes of the card's memory beside the weights is about what vLLM took
    context_max=131_072,
)
PROFILES = {profile.name: profile for profile in (H100_8B, H100_8B_OWN)}


def load(name: str) -> Profile:
    """A built-in profile by name, or a JSON file. Raises ValueError saying what is wrong."""
    if name in PROFILES:
        return PROFILES[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"no profile {name!r}: there are {', '.join(PROFILES)}, or a JSON file")
    try:
        parsed = msgspec.json.decode(path.read_bytes(), type=_File)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        theta, sigma = (parsed.theta, 0.05) if parsed.theta is not None else fitted(parsed.samples)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Profile(
        name=parsed.name,
        source=parsed.source or str(path),
        theta=theta,
        sigma=sigma if parsed.sigma is None else parsed.sigma,
        block_tokens=parsed.block_tokens,
        blocks_total=parsed.blocks_total,
        context_max=parsed.context_max,
        sequences_max=parsed.sequences_max,
        host_blocks=parsed.host_blocks,
        host_block_s=parsed.host_block_s,
    )


def fitted(samples: Sequence[StepSample]) -> tuple[Theta, float]:
    """The engine's own fit, turned over the samples until it settles; and the spread that it leaves, of the p90: a few
    steps that took several times as long would make a deviation that no other step has."""
    if not samples:
        raise ValueError("neither theta nor samples")
    fit = StepFit(H100_8B.model)
    steps = [StepFeatures(one.rows, one.decode_context, one.chunk_context, one.sequences) for one in samples]
    for _ in range(PASSES):
        for step, one in zip(steps, samples, strict=True):
            fit.observe(step, one.seconds)
    model = fit.model
    logs = np.array([math.log(one.seconds / model.step_s(step)) for step, one in zip(steps, samples, strict=True)])
    middle, high = np.percentile(logs, [50, 90])
    bias = model.bias * math.exp(float(middle))
    theta = Theta(*(bias * getattr(model, name) for name in Theta.__struct_fields__))
    return theta, min(SIGMA_MAX, float(high - middle) / Z90)
