"""`python -m engine tell`: an order about a worker itself, sent over its socket by a person or a trainer.

Owns one short connection. Never submits a request."""

from __future__ import annotations

import contextlib
import socket

from engine.wire import (
    PROTOCOL_VERSION,
    Control,
    FrameReader,
    Hello,
    Message,
    Told,
    Welcome,
    WireError,
    decode_from_worker,
    encode,
)
from engine.worker import StartError

READ_BYTES = 256 * 1024
WAIT_S = 600.0  # weights of a large model come from a slow disk


def tell(path: str, order: Control) -> None:
    """Return when it is done. Raises StartError when it is not."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as link:
        link.settimeout(WAIT_S)
        try:
            link.connect(path)
            _send(link, Welcome(PROTOCOL_VERSION, "tell", "", b""), order)
            told = _answer(link)
        except (OSError, WireError) as error:
            raise StartError(f"the worker on {path} did not answer: {error}") from error
    if told.error:
        raise StartError(told.error)


def _send(link: socket.socket, *messages: Message) -> None:
    for message in messages:
        link.sendall(encode(message))


def _answer(link: socket.socket) -> Told:
    """What is said about the order; the frames before it are others' business."""
    frames = FrameReader()
    while data := link.recv(READ_BYTES):
        for message in map(decode_from_worker, frames.feed(data)):
            if isinstance(message, Hello) and message.protocol != PROTOCOL_VERSION:
                raise WireError(f"it speaks protocol {message.protocol}")
            if isinstance(message, Told):
                return message
    raise WireError("it closed the connection")
