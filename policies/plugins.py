"""From a PolicySpec to a policy: a built-in name, an installed entry point, or `module:attribute`.

Owns the lookup. Runs nobody's code but the factory; the router guards what the policy does later."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from policies.api import EnginePolicy, PolicySpec, RouterPolicy
from policies.builtin import BUILTINS, ENGINES

# Entry points: name = "package.module:factory".
GROUP = "headway.policies"
ENGINE_GROUP = "headway.engine_policies"


class PolicyError(ValueError):
    """The spec names nothing that makes a RouterPolicy. The message is for whoever wrote the config."""


class ParamsError(PolicyError):
    """The policy is there, but does not take these parameters."""


def load(spec: PolicySpec) -> RouterPolicy:
    """The policy that `spec` names. Raises PolicyError, with what there is to choose from."""
    factory = BUILTINS.get(spec.ref) or _find(spec.ref, "policy", GROUP, BUILTINS)
    try:
        policy = factory(spec.params)
    except (TypeError, ValueError) as error:
        raise ParamsError(f"policy {spec.ref!r} does not take these parameters: {error}") from error
    if not isinstance(policy, RouterPolicy):
        raise PolicyError(f"policy {spec.ref!r} made a {type(policy).__name__}, not a RouterPolicy")
    return policy


def _find(ref: str, noun: str, group: str, builtins: Iterable[str]) -> Any:
    """Whatever a stranger's module holds; who asks checks what it makes."""
    module, colon, attribute = ref.partition(":")
    installed = {} if colon else {point.name: point for point in entry_points(group=group)}
    if not colon and ref not in installed:
        names = ", ".join(sorted({*builtins, *installed}))
        raise PolicyError(f"no {noun} is called {ref!r}; there are {names}, or module:attribute")
    try:
        return getattr(importlib.import_module(module), attribute) if colon else installed[ref].load()
    except Exception as error:  # border: a stranger's module may raise anything as it is imported
        raise PolicyError(f"{noun} {ref!r} cannot be imported: {error}") from error


def load_engine(ref: str) -> EnginePolicy:
    """The step policy called `ref`: built-in, an installed entry point, or `module:attribute`; a factory without
    parameters."""
    factory = ENGINES.get(ref) or _find(ref, "engine policy", ENGINE_GROUP, ENGINES)
    try:
        policy = factory()
    except Exception as error:  # border: a worker that is told a broken policy goes on with the one it has
        raise PolicyError(f"engine policy {ref!r} cannot be made: {error!r}") from error
    if not isinstance(policy, EnginePolicy):
        raise PolicyError(f"engine policy {ref!r} made a {type(policy).__name__}, not an EnginePolicy")
    return policy
