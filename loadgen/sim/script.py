"""Scripted failures: which worker dies or stalls, when, and for how long.

Owns the words. Never draws chance: a script is part of what makes a run repeat to the last digit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

PATTERN = re.compile(r"(kill|stall):w(\d+)@(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Failure:
    """`kill`: gone at once, back with an empty cache. `stall`: its next step takes so much longer."""

    kind: Literal["kill", "stall"]
    worker: int
    at_s: float
    for_s: float

    def told(self) -> list[tuple[float, str]]:
        """When what happens, in words."""
        if self.kind == "stall":
            return [(self.at_s, f"worker w{self.worker} stalls for {self.for_s:g} s, by the script")]
        name = f"worker w{self.worker}"
        return [(self.at_s, f"{name} killed, by the script"), (self.at_s + self.for_s, f"{name} up again")]

    @classmethod
    def parse(cls, text: str) -> Failure:
        """`kill:w1@120:30` or `stall:w0@50:2.5`. Raises ValueError."""
        match = PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no failure: write kill:w1@120:30 or stall:w0@50:2.5")
        kind: Literal["kill", "stall"] = "kill" if match[1] == "kill" else "stall"
        return cls(kind, int(match[2]), float(match[3]), float(match[4]))
