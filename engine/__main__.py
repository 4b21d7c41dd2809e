"""`python -m engine`: a worker process, a fake one without a model, or a model conversion.

Owns the command line. Errors are one sentence and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from engine.compute.compilers import Compilers, Wanted, compilers, seen
from engine.config import (
    GPU_BLOCK_TOKENS,
    GPU_CALIBRATE_S,
    GPU_KV_BYTES,
    GPU_SEQUENCES_MAX,
    KV_DTYPES,
    WEIGHTS,
    EngineConfig,
)  # fmt: skip
from engine.phases import Phases
from engine.worker import StartError

if TYPE_CHECKING:
    from engine.compute.gpu_runner import GpuRunner
    from engine.compute.parallel import ParallelRunner
    from engine.compute.runner import TorchRunner

T = TypeVar("T")


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
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("engine", "policies", ""):
            raise  # our own mistake
        print(f"engine: {error.name} is not installed: pip install 'headway[engine]'", file=sys.stderr)
        return 2


def _worker(arguments: argparse.Namespace) -> int:
    phases = Phases()
    config = _config(arguments)
    folder = _convert(config.model, arguments.cache)
    with contextlib.ExitStack() as ending:
        compiling = ending.enter_context(compilers())
        if early := _wanted(folder, config, arguments):
            compiling.begin(early)
        return _serve(folder, config, arguments, compiling, phases)


def _wanted(folder: Path, config: EngineConfig, arguments: argparse.Namespace) -> Wanted | None:
    """What a worker of this card will have compiled, as far as can be told without torch, which takes 3 s to import."""
    if config.device == "cpu" or config.tensor_parallel > 1 or (card := seen(config.device)) is None:
        return None
    gpu = _for_gpu(config, arguments)
    weights = "fp8" if config.has_fp8_weights else "bf16"
    return Wanted(folder, *card, gpu.block_tokens, gpu.sequences_max, weights=weights, kv_dtype=config.kv_dtype)


def _serve(
    folder: Path, config: EngineConfig, arguments: argparse.Namespace, compiling: Compilers, phases: Phases
) -> int:
    import torch  # takes a second: not before the arguments are known to be good

    from engine import build
    from engine.compute.grammar import GrammarCompiler
    from engine.compute.grammar_gate import no_grammars
    from engine.loading import manifest
    from engine.step import ModelFacts

    torch.set_num_threads(config.threads)
    if config.device == "auto":
        config = replace(config, device="cuda:0" if torch.cuda.is_available() else "cpu")
    if config.device.startswith("cuda"):
        config = _for_gpu(config, arguments)
        if int(config.device.partition(":")[2]) + config.tensor_parallel > torch.cuda.device_count():
            raise StartError(_no_card(config, torch.cuda.device_count()))
    elif config.has_fp8_weights:
        raise StartError("weights of 8 bits (--weights fp8) need a GPU; leave them bf16 on a CPU")
    elif config.kv_dtype == "fp8":
        raise StartError(f"fp8 KV is for GPU workers, and this one is for {config.device}: leave --kv-dtype out")
    phases.end("imports")
    with contextlib.ExitStack() as ending:
        runner = _explained(lambda: ending.enter_context(_running(folder, config, compiling, phases)))
        phases.end("model")
        facts = ModelFacts(
            name=config.model_name or Path(config.model).stem,
            digest=manifest.digest_of(folder),
            device=_shown(config),
            kv_dtype=_kv_dtype(config),
            vocab_size=runner.model.vocab_size,
            context_max=runner.model.context_max,
            eos_ids=tuple(runner.model.eos_ids),
        )
        tokenizer, compiler = folder / "tokenizer.json", no_grammars
        if tokenizer.is_file():
            text = tokenizer.read_text(encoding="utf-8")
            compiler = GrammarCompiler(text, facts.vocab_size, facts.eos_ids).compile
        code = build.serve(runner, facts, config, compile=compiler, phases=phases)
    if config.tensor_parallel > 1 and config.device.startswith("cuda"):
        logging.shutdown()
        os._exit(code)  # NCCL's own end waits for captured steps, and those live as long as the interpreter
    return code


@contextlib.contextmanager
def _running(
    folder: Path, config: EngineConfig, compiling: Compilers, phases: Phases
) -> Iterator[TorchRunner | GpuRunner | ParallelRunner]:
    """The runner that this configuration asks for."""
    if config.tensor_parallel > 1:
        from engine.compute import parallel

        with parallel.started(folder, config) as runner:
            yield runner
    elif config.device.startswith("cuda"):
        yield _gpu_runner(folder, config, compiling, phases)
    else:
        yield _torch_runner(folder, config)


def _kv_dtype(config: EngineConfig) -> str:
    """What KV is made of, and by what: weights of 8 bits give other KV, and in parts it lies otherwise: other keys."""
    on_gpu = {"bf16": "bfloat16", "fp8": "float8_e4m3 with float16 scales"}
    dtype = on_gpu[config.kv_dtype] if config.device.startswith("cuda") else "float32"
    dtype = f"{dtype} by 8-bit weights" if config.has_fp8_weights else dtype
    return dtype if config.tensor_parallel == 1 else f"{dtype} in {config.tensor_parallel} parts"


def _no_card(config: EngineConfig, cards: int) -> str:
    if config.tensor_parallel == 1:
        return f"there is no device {config.device} here, or this torch is built for CPUs alone"
    wanted = f"--tensor-parallel {config.tensor_parallel} from {config.device} on"
    return f"{wanted} needs more cards than the {cards} that are here"


def _shown(config: EngineConfig) -> str:
    """The device, for people."""
    import torch

    shown = f"{config.device} {torch.cuda.get_device_name(config.device)}" if config.device.startswith("cuda") else ""
    shown = shown or (config.device if config.device != "cpu" else f"cpu x{config.threads}")
    return shown if config.tensor_parallel == 1 else f"{shown}, {config.tensor_parallel} ranks"


def _torch_runner(folder: Path, config: EngineConfig) -> TorchRunner:
    from engine.compute.runner import RunnerConfig, TorchRunner
    from engine.loading import manifest

    manifest.verify(folder)
    options = RunnerConfig(block_tokens=config.block_tokens, kv_bytes=config.kv_bytes, device=config.device)
    return TorchRunner.load(folder, options)


def _for_gpu(config: EngineConfig, arguments: argparse.Namespace) -> EngineConfig:
    """What is not said on the command line gets the GPU's default instead of the CPU's."""
    return replace(
        config,
        device="cuda:0" if config.device == "cuda" else config.device,
        block_tokens=arguments.block_tokens or GPU_BLOCK_TOKENS,
        sequences_max=min(config.sequences_max, GPU_SEQUENCES_MAX),
        kv_bytes=arguments.kv_bytes or GPU_KV_BYTES,
        ahead_tokens=1,
        calibrate_s=GPU_CALIBRATE_S if arguments.calibrate_s is None else arguments.calibrate_s,
    )


def _gpu_runner(folder: Path, config: EngineConfig, compiling: Compilers, phases: Phases) -> TorchRunner | GpuRunner:
    import torch

    from engine.compute import gpu_build

    return gpu_build.load(
        folder,
        torch.device(config.device),
        block_tokens=config.block_tokens,
        kv_bytes=config.kv_bytes,
        sequences_max=config.sequences_max,
        has_fp8_weights=config.has_fp8_weights,
        is_kv_fp8=config.kv_dtype == "fp8",
        begun=compiling,
        phases=phases,
    )


def _convert_command(arguments: argparse.Namespace) -> int:
    print(_convert(arguments.model, arguments.cache))
    return 0


def _convert(model: str, cache: str) -> Path:
    """The folder to load; progress goes to stderr."""
    from engine.loading import convert

    kept = Path(cache).expanduser() if cache else convert.default_cache()
    return _explained(lambda: convert.convert(convert.locate(model), kept, convert.print_progress))


def _explained(make: Callable[[], T]) -> T:
    """What `make` gives; a model that cannot be served ends the process with its one sentence."""
    from engine.models.config import ModelError

    try:
        return make()
    except ModelError as error:
        raise StartError(str(error)) from error


def _tell(arguments: argparse.Namespace) -> int:
    from engine import tell
    from engine.wire import Control, SetPolicy, Sleep, UpdateWeights, Wake

    order: Control = SetPolicy(1, arguments.policy)
    if arguments.weights:
        order = UpdateWeights(1, str(Path(arguments.weights).resolve()), arguments.version)
    elif arguments.sleep or arguments.wake:
        order = Sleep(1, arguments.sleep) if arguments.sleep else Wake(1)
    tell.tell(arguments.socket, order)
    return 0


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
    import numpy as np

    words = np.fromfile(arguments.says, np.int32) if arguments.says is not None else None
    says = None if words is None else lambda _: words
    memory = (arguments.blocks, config.block_tokens)
    runner = fake.FakeRunner(facts, memory, fake.speed(arguments.slower), time.sleep, faults, says=says)
    return build.serve(runner, facts, config, encode=fake.encoder(runner, faults))


def _config(arguments: argparse.Namespace) -> EngineConfig:
    os.environ.setdefault("OMP_NUM_THREADS", str(getattr(arguments, "threads", 1)))  # before torch is imported
    names = set(EngineConfig.__dataclass_fields__) & set(vars(arguments))
    said = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return EngineConfig(**said)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine",
        description="Headway's engine: tokens in, tokens out, over a Unix socket (engine/wire.py).",
        epilog="`headway serve` starts workers by itself; these commands are for a worker alone.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    worker = commands.add_parser(
        "worker",
        help="serve a model on a socket",
        description="Load a model, learn the device's speed for a second, then serve routers on a Unix socket.",
        epilog="Example: python -m engine worker --model smollm2 --socket /tmp/w0.sock --threads 1",
    )
    _common(worker)
    _model(worker, worker.add_argument("--model", required=True))
    worker.add_argument(
        "--device", type=_device, default="cpu", help="cpu, cuda, cuda:1, or auto: cuda where one is (cpu)"
    )
    worker.add_argument("--threads", type=_count, default=1, help="CPU threads (1)")
    worker.add_argument(
        "--weights", choices=WEIGHTS, default="bf16", help="of layers, on a GPU; fp8: half the bytes (bf16)"
    )
    worker.add_argument(
        "--tensor-parallel", type=_count, default=1, help="cards of this host, or processes, that share the model (1)"
    )
    worker.add_argument(
        "--no-one-shot", dest="has_one_shot", action="store_false", help="all sums over cards by NCCL, also of few rows"
    )
    worker.add_argument("--kv-bytes", type=_count, help="memory for KV (512 MiB; on a GPU all that is free)")
    worker.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="of a GPU worker: fp8 holds nearly twice the tokens in as many bytes (bf16)",
    )
    worker.add_argument("--no-drafts", dest="has_drafts", action="store_false", help="no prompt-lookup speculation")
    worker.set_defaults(command=_worker)
    convert = commands.add_parser(
        "convert",
        help="make a model ready for workers, print its folder",
        description="Convert a GGUF model once to a cached folder of safetensors; a folder is checked and left alone.",
    )
    _model(convert, convert.add_argument("model"))
    convert.set_defaults(command=_convert_command)
    tell = commands.add_parser(
        "tell",
        help="change a running worker: its weights, its step policy, or put it to sleep",
        description="Returns when it is done. With other weights, answers that run go on behind their tokens, KV of "
        "the old weights is void, and every frame says the version that its tokens were computed by. A worker that "
        "sleeps gives memory back and computes nothing; its KV stays in the host pool.",
        epilog="Example: python -m engine tell --socket /tmp/w0.sock --weights ./step-200 --version 200",
    )
    tell.add_argument("--socket", required=True, help="the worker's Unix socket")
    what = tell.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", default="", help="a Hugging Face folder of the same shape")
    what.add_argument("--policy", default="", help="a built-in step policy, or module:attribute")
    what.add_argument("--sleep", type=int, choices=(1, 2), help="give back its KV memory (1), its weights as well (2)")
    what.add_argument("--wake", action="store_true", help="load what sleep gave back, and go on")
    tell.add_argument("--version", type=int, default=1, help="of these weights, as frames will say it (1)")
    tell.set_defaults(command=_tell)
    fake = commands.add_parser(
        "fake",
        help="a worker without a model, for tests: tokens are hash(prompt, index)",
        description="A worker without a model. Tokens are hash(prompt, index): a lost, repeated or foreign one shows.",
        epilog="Example: python -m engine fake --socket /tmp/w0.sock --fault stall@100:5",
    )
    _common(fake)
    fake.add_argument("--blocks", type=_count, default=512, help="KV blocks (512)")
    fake.add_argument("--vocab", type=_count, default=49152, help="vocabulary size (49152)")
    fake.add_argument("--context", type=_count, default=8192, help="context length (8192)")
    fake.add_argument("--slower", type=float, default=1.0, help="times slower than 2.5 ms a step, 50k prompt tokens/s")
    fake.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND@STEP[:S]",
        help="stall, nan, foreign (a token outside the vocabulary), bad-frame or die at that step; may be repeated",
    )
    fake.add_argument("--says", type=Path, help="int32 token ids of every answer, for parsers (hashes)")
    fake.set_defaults(command=_fake)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def _device(text: str) -> str:
    if text not in ("auto", "cpu", "cuda") and not (text.startswith("cuda:") and text[5:].isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda, cuda:N or auto")
    return text


def _model(parser: argparse.ArgumentParser, argument: argparse.Action) -> None:
    argument.help = "smollm2 (embedded), a .gguf file, a Hugging Face folder, or org/name[@revision] on the hub"
    parser.add_argument("--cache", default="", help="where conversions are kept (~/.cache/headway/models)")


def _common(parser: argparse.ArgumentParser) -> None:
    default = EngineConfig(socket="")
    parser.add_argument("--socket", required=True, help="Unix socket to listen on; made with mode 0600")
    parser.add_argument("--name", default=default.name, help="the worker's name, stable over restarts (w0)")
    parser.add_argument("--model-name", default="", help="the name that clients use")
    parser.add_argument("--block-tokens", type=_count, help="tokens a KV block (16; on a GPU 64)")
    parser.add_argument(
        "--policy", default=default.policy, help="which step policy: a name or module:factory (headway)"
    )
    parser.add_argument("--sequences-max", type=_count, default=default.sequences_max, help="resident at once (256)")
    parser.add_argument("--waiting-max", type=_count, default=default.waiting_max, help="waiting, then refused (1024)")
    parser.add_argument("--drain-s", type=_seconds, default=default.drain_s, help="grace on SIGTERM, seconds (30)")
    parser.add_argument("--send-s", type=_seconds, default=default.send_s, help="a link that reads nothing is cut (30)")
    parser.add_argument("--calibrate-s", type=_seconds, help="at start, seconds (1; on a GPU 0.5)")
    parser.add_argument("--pool-fd", type=int, default=default.pool_fd, help="descriptor of the host pool's memory")
    parser.add_argument("--pool-share", type=_count, default=default.pool_share, help="workers that share the pool (1)")
    parser.add_argument("--disk-dir", default=default.disk_dir, help="folder for KV that the pool evicts (none)")
    parser.add_argument("--disk-bytes", type=int, default=default.disk_bytes, help="at most so much of it there")


if __name__ == "__main__":
    sys.exit(main())
