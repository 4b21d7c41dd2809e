"""How well a sequence's drafts have done lately, and so how likely the next ones are to be right.

Owns two numbers of one sequence. Drafts nothing."""

from __future__ import annotations

MEMORY = 0.25  # weight of the newest draft in the share that was right
REST_STEPS_MAX = 64  # after drafts that were all wrong; doubles from 2


class Habit:
    """Made with a sequence; half of the first draft is taken to be right."""

    __slots__ = ("_failures", "_rests", "right")

    def __init__(self) -> None:
        self.right = 0.5  # share of drafted tokens that were right, recent ones more
        self._rests = 0
        self._failures = 0  # drafts in a row with nothing right

    def is_resting(self) -> bool:
        """Whether to sit this step out; asking counts as the step."""
        self._rests = max(0, self._rests - 1)
        return self._rests > 0

    def note(self, drafted: int, right: int) -> None:
        """A draft was judged."""
        self.right += MEMORY * (right / drafted - self.right)
        self._failures = 0 if right else self._failures + 1
        self._rests = min(2**self._failures, REST_STEPS_MAX) if self._failures else 0
