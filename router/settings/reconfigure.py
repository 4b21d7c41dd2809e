"""A changed configuration in a running router: what can change at once does, as an event; the rest is named.

Owns which keys those are. The keys file is not among them: it is followed by itself."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from policies.events import Reconfigured
from policies.plugins import PolicyError
from router.access.tenants import Tenants
from router.control.mind import Mind, clock_zero_s
from router.control.reducer import load_policy, policy_spec
from router.listener.readiness import Readiness
from router.settings.config import Config

log = logging.getLogger(__name__)

HOT = ("classes.", "policy.ref", "policy.params")  # keys that a running router takes


class Reconfigurer:
    """What SIGHUP means: read `path` again, where the keeper has put the new configuration."""

    def __init__(self, path: Path, config: Config, mind: Mind, readiness: Readiness, tenants: Tenants) -> None:
        self.config = config  # in force
        self._path, self._mind, self._readiness, self._tenants = path, mind, readiness, tenants

    def apply(self) -> None:
        """Take what is new. What cannot be used changes nothing, and is said."""
        self._tenants.reload()
        try:
            wanted = Config.from_json(self._path.read_bytes())
            policy = load_policy(wanted, deque(), is_timed=False)  # the reducer loads its own; this one prints budgets
        except (OSError, msgspec.DecodeError, PolicyError) as error:
            log.error("the configuration is not changed: %s", error)
            return
        changed = sorted(differences(self.config, wanted))
        cold = [key for key in changed if not key.startswith(HOT)]
        if len(cold) < len(changed):
            self.config = msgspec.structs.replace(
                self.config,
                classes=wanted.classes,
                policy=msgspec.structs.replace(self.config.policy, ref=wanted.policy.ref, params=wanted.policy.params),
            )
            spec = policy_spec(self.config).to_json()
            self._mind.reconfigured(Reconfigured(self.config.digest, spec, clock_zero_s()))
            self._readiness.policy = policy
        log.info("the configuration was read again; changed: %s", ", ".join(changed) or "nothing")
        if cold:
            log.warning("these need a restart: %s", ", ".join(cold))


def differences(before: Config, after: Config) -> Iterator[str]:
    """The keys that differ, such as `classes.chatbot+.ttft_s`."""
    old, new = dict(_flat(msgspec.to_builtins(before))), dict(_flat(msgspec.to_builtins(after)))
    return (key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{above}{name}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value
