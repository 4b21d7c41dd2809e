"""The salt of each domain: KV of one organisation never answers for another one.

Owns the key behind the salts, kept on disk so that a restarted router still finds what its workers hold."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

KEY_BYTES = 32
SALT_BYTES = 16


class Salts:
    """Salts of all domains of one deployment."""

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES
        self._key = key

    @classmethod
    def load(cls, path: Path) -> Salts:
        """With the key in `path`, made on first use and readable by its owner alone. Raises OSError."""
        try:
            return cls(path.read_bytes())
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_name(f"{path.name}.{os.getpid()}")
        descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(made, path)  # the first of several routers wins; nobody reads half a key
        except FileExistsError:
            made.unlink()
            return cls(path.read_bytes())
        made.unlink()
        return cls(path.read_bytes())

    def of(self, domain: str) -> bytes:
        """The salt of a domain: 16 bytes that nobody without the key can guess."""
        return hmac.new(self._key, domain.encode(), hashlib.sha256).digest()[:SALT_BYTES]
