"""The command line: `headway serve`, `check-config`, `keys`, `replay-events`, `explain-class`.

Owns the words and the exit codes. Never serves anything itself: it makes a plan and hands it to the keeper."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router.access import keys_cli
from router.version import code_version

if TYPE_CHECKING:
    from router.settings.config import Config

DEFAULT_FILE = "headway.toml"

TEACH = """\
examples:
  headway serve                                   two CPU workers on the embedded model, http://127.0.0.1:8080
  headway serve --port 9000 --workers 4
  headway serve --model ./model.gguf              a GGUF file, a folder with safetensors, or org/name on the hub
  headway serve --record run.jsonl                record every decision; then: headway replay-events run.jsonl
  headway serve --upstream http://gpu1:8000 --upstream http://gpu2:8000    in front of vLLM or SGLang
  headway keys add alice                          a key; with the first one, all callers need theirs
  headway serve --config headway.toml             see headway check-config for what is wrong with it

Every key of the file has a variable, HEADWAY_SERVER_PORT for server.port; a flag wins over both."""


CHECK = """\
Names file, line and key of whatever is wrong, the nearest key that exists, and paths that are not there; the
environment counts, too. Exit code 0: good.

example:
  headway check-config headway.toml"""

REPLAY = """\
Feeds the recorded events to the same mind and compares its actions with those recorded. Exit code 1: they differ.

example:
  headway serve --record run.jsonl      ... requests, Ctrl-C
  headway replay-events run.jsonl"""

EXPLAIN = """\
Prints what a recorded request said of itself, what was remembered of its session, and which row of the table decided.

example:
  headway explain-class run.jsonl 49780ea5b837     the x-headway-request of an answer, or its beginning"""

MISUSED = 2
RAW = argparse.RawDescriptionHelpFormatter


def main(argv: Sequence[str] | None = None) -> int:
    """The `headway` command. Returns the exit code: 0 good, 1 no, 2 misused."""
    arguments = _parser().parse_args(argv)
    run: Any = arguments.run
    code: int = run(arguments)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headway",
        description="A reverse proxy for LLM clients that spends each request's latency budget on its own workers.",
        epilog=TEACH,
        formatter_class=RAW,
    )
    parser.add_argument("--version", action="version", version=f"headway {code_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    check = commands.add_parser(
        "check-config", help="explain what is wrong with a configuration", epilog=CHECK, formatter_class=RAW
    )
    check.add_argument("file", nargs="?", type=Path, help=f"default: {DEFAULT_FILE} if it exists")
    check.set_defaults(run=_check_config)
    keys_cli.add_to(commands, default_file)
    replay = commands.add_parser(
        "replay-events",
        help="decide a recording again and compare byte for byte",
        epilog=REPLAY,
        formatter_class=RAW,
    )
    replay.add_argument("file", type=Path, help="what `headway serve --record` wrote")
    replay.set_defaults(run=_replay_events)
    explain = commands.add_parser(
        "explain-class", help="say why a recorded request is of its class", epilog=EXPLAIN, formatter_class=RAW
    )
    explain.add_argument("file", type=Path, help="what `headway serve --record` wrote")
    explain.add_argument("request", help="x-headway-request of its answer")
    explain.set_defaults(run=_explain_class)
    return parser


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="start router and workers, and keep them until Ctrl-C",
        epilog=TEACH,
        formatter_class=RAW,
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help=f"default: {DEFAULT_FILE} if it exists")
    serve.add_argument("--port", type=int, help="where clients connect; 0 takes a free one [server.port]")
    serve.add_argument("--admin-port", type=int, help="dashboard and metrics; 0 takes a free one [server.admin_port]")
    serve.add_argument("--workers", type=int, metavar="N", help="engine processes [workers.count]")
    serve.add_argument(
        "--model",
        metavar="MODEL",
        help="smollm2, a GGUF file, a folder, or org/name on the hub [model.name]",
    )
    serve.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda, or fake: made-up tokens [workers.device]")
    serve.add_argument("--policy", metavar="REF", help="a built-in, an entry point or module:factory [policy.ref]")
    serve.add_argument(
        "--upstream",
        action="append",
        metavar="URL",
        help="a vLLM, SGLang or other OpenAI-compatible server instead of own workers; may be repeated [upstreams]",
    )
    serve.add_argument("--record", metavar="FILE", help="record what the mind sees and decides [record.path]")
    serve.set_defaults(run=_serve)


FLAGS = {  # flag -> key
    "port": "server.port",
    "admin_port": "server.admin_port",
    "workers": "workers.count",
    "model": "model.name",
    "device": "workers.device",
    "policy": "policy.ref",
    "record": "record.path",
}


def _serve(arguments: argparse.Namespace) -> int:
    from router.access.keys import KeysError
    from router.host.keeper import Keeper
    from router.host.plan import make_plan, reread
    from router.settings.config_load import ConfigError

    given = vars(arguments)
    flags = {
        key: (f"--{name.replace('_', '-')}", given[name]) for name, key in FLAGS.items() if given[name] is not None
    }
    if arguments.upstream:
        flags["upstreams"] = ("--upstream", [{"url": url} for url in arguments.upstream])
    try:
        path: Path | None = arguments.config or default_file()
        config = checked(path, flags, os.environ)
    except (ConfigError, KeysError) as error:
        return _complain(error, MISUSED)
    return Keeper(make_plan(config, os.environ, reread=reread(path, flags))).run()


def checked(path: Path | None, flags: Mapping[str, tuple[str, Any]], env: Mapping[str, str]) -> Config:
    """The configuration in force, and nothing about it that the router would refuse: here it costs no start of a model
    to be told no. Raises ConfigError or KeysError."""
    from router.access.keys import check_reach
    from router.settings.config_load import load

    config = load(path, env, flags, checks=[_policy_faults])
    check_reach(config)
    return config


def _policy_faults(config: Config) -> Iterator[tuple[str, ...]]:
    from policies.plugins import ParamsError, PolicyError, load_engine
    from policies.plugins import load as load_policy
    from router.control.reducer import policy_spec

    try:
        load_policy(policy_spec(config))
    except ParamsError as error:
        yield "policy.params", "policy.ref", str(error)
    except PolicyError as error:
        yield "policy.ref", str(error)
    try:
        load_engine(config.policy.engine)
    except PolicyError as error:
        yield "policy.engine", str(error)


def _check_config(arguments: argparse.Namespace) -> int:
    from router.access.keys import KeysError
    from router.settings.config_load import ConfigError

    path: Path | None = arguments.file or default_file()
    try:
        config = checked(path, {}, os.environ)
    except (ConfigError, KeysError) as error:
        return _complain(error)
    print(f"{path or 'the defaults'}: good (digest {config.digest})")
    return 0


def _explain_class(arguments: argparse.Namespace) -> int:
    from policies.plugins import PolicyError
    from router.control.explain import ask, words
    from router.control.record import RecordError

    try:
        print(words(ask(arguments.file, arguments.request)))
    except (RecordError, PolicyError) as error:
        return _complain(error)
    return 0


def _replay_events(arguments: argparse.Namespace) -> int:
    from policies.plugins import PolicyError
    from router.control.record import RecordError
    from router.control.replay import explain, replay

    try:
        outcome = replay(arguments.file)
    except (RecordError, PolicyError) as error:
        return _complain(error)
    header = outcome.header
    if header.code_version != code_version():
        print(f"recorded by {header.code_version}, replayed by {code_version()}")
    if outcome.difference is None:
        print(f"{outcome.events} events, {outcome.actions} actions: equal byte for byte")
        return 0
    print(f"event {outcome.events} gives other actions than were recorded:\n{explain(outcome.difference)}")
    return 1


def default_file() -> Path | None:
    """The configuration that lies here, if one does."""
    path = Path(DEFAULT_FILE)
    return path if path.exists() else None


def _complain(error: Exception, code: int = 1) -> int:
    print(error, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
