"""From a PolicySpec to a policy: a built-in name, an installed entry point, or `module:attribute`.

Owns the lookup. Runs nobody's code but the factory; the router guards what the policy does later."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from policies.api import EnginePolicy, PolicySpec, RouterPolicy
from policies.builtin import BUILTINS, ENGINES

GROUP = "headway.policies"  # entry points: name = "package.module:factory"


class PolicyError(ValueError):
    """The spec names nothing that makes a RouterPolicy. The message is for whoever wrote the config."""


class ParamsError(PolicyError):
    """The policy is there, but does not take these parameters."""


def load(spec: PolicySpec) -> RouterPolicy:
    """The policy that `spec` names. Raises PolicyError, with what there is to choose from."""
    factory = BUILTINS.get(spec.ref) or _find(spec.ref)
    try:
        policy = factory(spec.params)
    except (TypeError, ValueError) as error:
        raise ParamsError(f"policy {spec.ref!r} does not take these parameters: {error}") from error
    if not isinstance(policy, RouterPolicy):
        raise PolicyError(f"policy {spec.ref!r} made a {type(policy).__name__}, not a RouterPolicy")
    return policy


def _find(ref: str):  # type: ignore[no-untyped-def]  # whatever a stranger's module holds; `load` checks what it makes
    if ":" in ref:
        module, _, attribute = ref.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:  # border: a stranger's module may raise anything as it is imported
            raise PolicyError(f"policy {ref!r} cannot be imported: {error}") from error
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if ref not in installed:
        names = ", ".join(sorted({*BUILTINS, *installed}))
        raise PolicyError(f"no policy is called {ref!r}; there are {names}, or module:attribute")
    return installed[ref].load()


def load_engine(ref: str) -> EnginePolicy:
    """The step policy called `ref`: a built-in one, or `module:attribute`, a factory without parameters."""
    factory = ENGINES.get(ref) or (_find(ref) if ":" in ref else None)
    if factory is None:
        raise PolicyError(f"no engine policy is called {ref!r}; there are {', '.join(ENGINES)}, or module:attribute")
    try:
        policy = factory()
    except Exception as error:  # border: a worker that is told a broken policy goes on with the one it has
        raise PolicyError(f"engine policy {ref!r} cannot be made: {error!r}") from error
    if not isinstance(policy, EnginePolicy):
        raise PolicyError(f"engine policy {ref!r} made a {type(policy).__name__}, not an EnginePolicy")
    return policy
