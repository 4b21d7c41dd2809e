"""The models that clients may name: what workers serve, aliases for it, and the pages that list it.

Owns the way from a client's name to a model. Never starts one."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from router.errors import RequestError
from router.workers.fleet import ModelView

PAGE_MAX = 1000  # models of one page, whatever `limit` says


class Catalogue:
    """Names to models."""

    def __init__(
        self,
        models: Callable[[], Mapping[str, ModelView]],
        default: str,
        aliases: Mapping[str, str],
        created: int,
        patterns: Sequence[str] = (),
    ) -> None:
        self._models = models
        self._default = default  # for clients that name none; empty: the first that there is
        self._aliases = aliases  # pattern to name; an empty name means the default
        self._created = created  # second of the router's start
        self._patterns = patterns  # of models that may be seen; none: all

    def seen_by(self, patterns: Sequence[str]) -> Catalogue:
        """This catalogue for a key that is good for some models: the others look as if they were not there."""
        if not patterns:
            return self
        return Catalogue(self._models, self._default, self._aliases, self._created, patterns)

    def _visible(self) -> Mapping[str, ModelView]:
        models = self._models()
        if not self._patterns:
            return models
        return {
            name: view for name, view in models.items() if any(fnmatch.fnmatchcase(name, p) for p in self._patterns)
        }

    # Hot: once per request.
    def find(self, name: str) -> ModelView:
        """The model as its workers describe it, or did before they went away: the mind holds what waits for them."""
        if not self._models():
            message = "No worker has started yet; try again in a moment."
            raise RequestError(503, message, code="no-worker", retry_after_s=2.0)
        models = self._visible()
        view = models.get(name or self._first(models)) or models.get(self._alias(name))
        if view is None:
            raise self._unknown(models)
        return view

    def _first(self, models: Mapping[str, ModelView]) -> str:
        return self._default or next(iter(models), "")

    def _alias(self, name: str) -> str:
        """What the first alias that fits stands for; empty when none does."""
        for pattern, model in self._aliases.items():
            if fnmatch.fnmatchcase(name, pattern):
                return model or self._first(self._visible())
        return ""

    def _unknown(self, models: Mapping[str, ModelView]) -> RequestError:
        names = ", ".join([*models, *self._aliases])
        return RequestError(
            404, f"There is no such model here. Served: {names}.", param="model", code="model_not_found"
        )

    def page(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The list, as OpenAI's and Anthropic's SDKs read it; `limit`, `after_id` and `before_id` are Anthropic's."""
        models = [self._entry(view) for view in self._visible().values()]
        ids = [model["id"] for model in models]
        begin = ids.index(query["after_id"]) + 1 if query.get("after_id") in ids else 0
        end = ids.index(query["before_id"]) if query.get("before_id") in ids else len(ids)
        limit = int(query["limit"]) if query.get("limit", "").isdecimal() else PAGE_MAX
        shown = models[begin:end][: max(1, min(limit, PAGE_MAX))]
        names = [model["id"] for model in shown]
        edges = {"first_id": names[0] if names else None, "last_id": names[-1] if names else None}
        return {"object": "list", "data": shown, **edges, "has_more": len(shown) < end - begin}

    def entry(self, name: str) -> dict[str, Any]:
        """One model. Raises RequestError 404."""
        models = self._visible()
        view = (models.get(name) or models.get(self._alias(name))) if name else None
        if view is None:
            raise self._unknown(models)
        return self._entry(view)

    def _entry(self, view: ModelView) -> dict[str, Any]:
        return {
            "id": view.name,
            "object": "model",
            "type": "model",
            "created": self._created,
            "created_at": _iso(self._created),
            "owned_by": "headway",
            "display_name": view.name,
            "max_model_len": view.context_max or None,  # an upstream need not say
        }


def _iso(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
