"""Profiles: a file of timed steps becomes the coefficients that made them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from loadgen.sim.profiles import H100_8B, H100_8B_OWN, load
from policies.costs import StepFeatures


def samples(seed: int = 0) -> list[dict[str, float]]:
    rng, model, made = np.random.default_rng(seed), H100_8B.model, []
    for number in range(400):
        chunk = int(rng.integers(0, 2000)) if number % 2 else 0
        streams = int(rng.integers(1, 64))
        features = StepFeatures(
            streams + chunk, streams * int(rng.integers(100, 4000)), chunk * 1000, streams + bool(chunk)
        )
        seconds = model.step_s(features) * float(np.exp(0.03 * rng.standard_normal()))
        made.append(features._asdict() | {"seconds": seconds})
    return made


def test_a_profile_is_fitted_to_samples(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    path.write_bytes(msgspec.json.encode({"name": "x", "blocks_total": 10, "context_max": 100, "samples": samples()}))
    profile = load(str(path))
    for step in (StepFeatures(8, 8000, 0, 8), StepFeatures(1500, 20_000, 1_400_000, 20)):
        assert profile.model.step_s(step) == pytest.approx(H100_8B.model.step_s(step), rel=0.05)
    assert profile.sigma == pytest.approx(0.03, rel=0.4)


def test_the_own_engines_profile_is_what_its_timed_steps_say() -> None:
    """The figures in the comment beside it."""
    path = Path(__file__).parents[3] / "bench" / "results" / "step_samples-llama-8b-h100.jsonl"
    steps = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()[1:]]
    model = H100_8B_OWN.model
    errors = [seconds / model.step_s(StepFeatures(*map(int, features))) for *features, seconds in steps]
    p10, p50, p90, p99 = np.percentile(errors, [10, 50, 90, 99])
    assert len(steps) == 3354
    assert np.median(np.abs(np.log(errors))) < 0.05
    assert p50 == pytest.approx(1.0, abs=0.02)
    assert p10 == pytest.approx(0.92, abs=0.01)
    assert p90 == pytest.approx(np.exp(1.2816 * H100_8B_OWN.sigma), abs=0.02)
    assert p99 > 2.4


@pytest.mark.parametrize("text", ["{}", '{"name": "x", "blocks_total": 1, "context_max": 1}', '{"name": 3}'])
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json"):
        load(str(path))


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(ValueError, match="8b-h100"):
        load("9b-h200")
