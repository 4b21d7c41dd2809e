"""What a text-only model gets to read where a client sent an image or a document.

Owns the words, and those of a refusal (`model.on_media`). A refused image would stay in the history of its session and
end it; these words let it go on."""

from __future__ import annotations

from collections.abc import Iterable

from router.dialects.schema import ContentPart
from router.errors import RequestError

KINDS = {
    "image_url": "image",
    "input_image": "image",
    "input_audio": "audio",
    "file": "document",
    "input_file": "document",
}


class Media:
    """Counts what was left out of one request."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._omitted: dict[str, int] = {}

    def omitted(self, kind: str) -> str:
        """The words that stand for one image, document, ..."""
        self._omitted[kind] = self._omitted.get(kind, 0) + 1
        return f"[{kind} omitted: {self._model or 'this model'} cannot see]"

    def counts(self) -> tuple[tuple[str, int], ...]:
        """How many of each kind."""
        return tuple(self._omitted.items())


def cannot_see(media: Iterable[tuple[str, int]]) -> RequestError:
    """400 where such things are refused instead."""
    counts = ", ".join(f"{kind} ({count})" for kind, count in media)[:200]
    return RequestError(400, f"This model reads text alone, and there are: {counts}.", code="unsupported_media")


def part_text(part: ContentPart, media: Media) -> str:
    """What a part of OpenAI's content says to a model that reads text alone."""
    if part.type in ("text", "input_text", "output_text", "reasoning_text"):
        return part.text
    return part.refusal if part.type == "refusal" else media.omitted(KINDS.get(part.type, "part"))
