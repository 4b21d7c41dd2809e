"""`python -m engine`: a worker process, a fake one without a model, or a model conversion.

Owns the command line. Errors are one sentence and exit code 2."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable

from engine.config import EngineConfig
from engine.worker import StartError


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except (StartError, ValueError) as error:
        print(f"engine: {error}", file=sys.stderr)
        return 2


def _fake(arguments: argparse.Namespace) -> int:
    from engine import build, fake
    from engine.step import ModelFacts

    config = _config(arguments)
    facts = ModelFacts(
        name=config.model_name or "fake",
        digest="fake",
        device="fake",
        kv_dtype="ids",
        vocab_size=arguments.vocab,
        context_max=arguments.context,
        eos_ids=(2,),
    )
    faults = tuple(fake.Fault.parse(text) for text in arguments.fault)
    runner = fake.FakeRunner(
        facts, (arguments.blocks, config.block_tokens), fake.speed(arguments.slower), time.sleep, faults
    )
    return build.serve(runner, facts, config, encode=fake.encoder(runner, faults))


def _config(arguments: argparse.Namespace) -> EngineConfig:
    if arguments.die_with_parent:
        die_with_parent()
    os.environ.setdefault("OMP_NUM_THREADS", str(getattr(arguments, "threads", 1)))  # before torch is imported
    names = set(EngineConfig.__dataclass_fields__) & set(vars(arguments))
    return EngineConfig(**{name: getattr(arguments, name) for name in names})


def die_with_parent() -> None:
    """Have Linux send SIGTERM when the parent dies; elsewhere the parent's loss is noticed by its links alone."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() == 1:
        raise StartError("the parent process is gone already")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine",
        description="Headway's engine: tokens in, tokens out, over a Unix socket (engine/wire.py).",
        epilog="`headway serve` starts workers by itself; these commands are for a worker alone.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fake = commands.add_parser(
        "fake",
        help="a worker without a model, for tests: tokens are hash(prompt, index)",
        description="A worker without a model. Its tokens are hash(prompt, index): a lost, repeated or foreign one shows.",
        epilog="Example: python -m engine fake --socket /tmp/w0.sock --fault stall@100:5",
    )
    _common(fake)
    fake.add_argument("--blocks", type=int, default=512, help="KV blocks (512)")
    fake.add_argument("--vocab", type=int, default=49152, help="vocabulary size (49152)")
    fake.add_argument("--context", type=int, default=8192, help="context length (8192)")
    fake.add_argument("--slower", type=float, default=1.0, help="times slower than 2.5 ms a step, 50k prompt tokens/s")
    fake.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND@STEP[:S]",
        help="stall, nan, foreign (a token outside the vocabulary), bad-frame or die at that step; may be repeated",
    )
    fake.set_defaults(command=_fake)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    default = EngineConfig(socket="")
    parser.add_argument("--socket", required=True, help="Unix socket to listen on; made with mode 0600")
    parser.add_argument("--name", default=default.name, help="the worker's name, stable over restarts (w0)")
    parser.add_argument("--model-name", default="", help="the name that clients use")
    parser.add_argument("--block-tokens", type=int, default=default.block_tokens, help="tokens a KV block (16)")
    parser.add_argument("--sequences-max", type=int, default=default.sequences_max, help="resident at once (256)")
    parser.add_argument("--waiting-max", type=int, default=default.waiting_max, help="waiting, then refused (1024)")
    parser.add_argument("--drain-s", type=float, default=default.drain_s, help="grace on SIGTERM, seconds (30)")
    parser.add_argument("--calibrate-s", type=float, default=default.calibrate_s, help="at start, seconds (1)")
    parser.add_argument("--die-with-parent", action="store_true", help="drain when the parent process dies (Linux)")


if __name__ == "__main__":
    sys.exit(main())
