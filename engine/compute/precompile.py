"""Every kernel a GPU worker will launch, compiled beside the loading of its weights, in as many processes as cores.

Owns the rehearsal (the runner's own launches over tensors that lie nowhere, each told to this file instead of being
compiled) and the processes. Never touches a GPU: what it makes is found in Triton's cache by whoever launches it.

    python -m engine.compute.precompile MODEL_DIR "NVIDIA H100 80GB HBM3" [--capability 90] [--jobs 16]"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from engine.compute.arrange import bucket
from engine.compute.gpu_runner import GpuRunner, warm_captured, warm_compiled
from engine.config import GPU_BLOCK_TOKENS, GPU_SEQUENCES_MAX, KV_DTYPES, WEIGHTS
from engine.kernels import check
from engine.models import config as model_config
from engine.models import gpu
from engine.models.config import ModelConfig
from engine.models.shard import WHOLE, Shard

log = logging.getLogger(__name__)

NOWHERE = torch.device("meta")
DTYPE = torch.bfloat16
BLOCKS = 1 << 16  # enough that no two made-up sequences share one; the memory of the real card is not known yet
WAIT_S = 300.0  # how long a worker waits for the compilers before it compiles by itself
LONGEST = ("choose", "prefill", "attend")  # these first: seconds each, where a product takes one


class Special(NamedTuple):
    """One kernel for one set of types, constants and options."""

    module: str
    kernel: str
    data: str  # Triton's own JSON of it

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from others: Triton's cache key is within."""
        return self.module, self.kernel, json.loads(self.data)["key"]


class Absent:
    """Triton's driver of a card that is not here: enough to bind arguments and to compile."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def noted(found: dict[tuple[str, str, str], Special]) -> Iterator[None]:
    """Launches in here compile and run nothing: each new one is noted."""

    def note(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:  # noqa: A002  # Triton's name
        special = Special(fn.module, fn.name, compile["specialization_data"])
        found.setdefault(special.key, special)
        return True

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before


def specials(
    config: ModelConfig, card: str, block_tokens: int, sequences_max: int, *, has_fp8_weights: bool = False,
    is_kv_fp8: bool = False,
) -> list[Special]:  # fmt: skip
    """All that a worker of this model compiles at its start on that card, the longest first."""
    found: dict[tuple[str, str, str], Special] = {}
    with noted(found), torch.inference_mode():
        weights = gpu.random_weights(config, NOWHERE, DTYPE, is_fp8=has_fp8_weights)
        weights = replace(weights, layers=weights.layers[:2])  # the first, and one for all that follow
        runner = GpuRunner(weights, block_tokens, BLOCKS, sequences_max, card=card, is_kv_fp8=is_kv_fp8)
        for batch in warm_captured(block_tokens, BLOCKS, bucket(sequences_max), config.context_max):
            runner.rehearse(batch)
        for batch in warm_compiled(block_tokens, bucket(sequences_max), config.context_max):
            runner.rehearse(batch)
        shape = gpu.shape_of(config, block_tokens, is_kv_fp8=is_kv_fp8)
        check.failures(torch.device("cpu"), DTYPE, shape, has_fp8=weights.has_fp8)  # it fails: nothing ran
    return sorted(found.values(), key=lambda one: (one.kernel not in LONGEST, one.kernel, one.data))


def compiled(special: Special) -> Any:
    """Triton's compiled kernel, made now or found in its cache."""
    return getattr(importlib.import_module(special.module), special.kernel).preload(special.data)


def seconds(special: Special) -> float:
    """How long that took."""
    started = time.perf_counter()
    compiled(special)
    return time.perf_counter() - started


def compile_all(wanted: list[Special], jobs: int) -> list[float]:
    """Seconds of each. Raises what the compiler raises."""
    if jobs == 1:
        return [seconds(special) for special in wanted]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(seconds, wanted))


@contextmanager
def beside(
    folder: Path, device: torch.device, block_tokens: int, sequences_max: int, shard: Shard = WHOLE,
    *, has_fp8_weights: bool = False, is_kv_fp8: bool = False,
) -> Iterator[None]:  # fmt: skip
    """Compile for the card at hand while the body runs, in processes that never see the card; then wait for them.
    Whatever they did not make is compiled where it is launched: later, and no worse."""
    major, minor = torch.cuda.get_device_capability(device)
    card = torch.cuda.get_device_name(device)
    command = [
        sys.executable, "-m", __name__, str(folder), card, "--capability", str(10 * major + minor),
        "--block-tokens", str(block_tokens), "--sequences-max", str(sequences_max),
        "--ranks", str(shard.ranks), "--weights", "fp8" if has_fp8_weights else "bf16",
        "--kv-dtype", "fp8" if is_kv_fp8 else "bf16",
    ]  # fmt: skip
    with running(command) as compilers:
        yield
        if code := compilers.wait(WAIT_S):
            log.warning("kernels were not compiled ahead (exit %d): the start takes longer", code)


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that sees no card, ended with all it started when the body is left, however that is."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        yield process
    except subprocess.TimeoutExpired:
        log.warning("kernels were not compiled in %.0f s: the start takes longer", WAIT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stamp(arguments: argparse.Namespace, config: ModelConfig) -> Path:
    """A file in Triton's cache that says: all of this is made."""
    sources = sorted(Path(gpu.__file__).parents[1].glob("kernels/**/*.*[ny]"))  # .py and .json
    facts = [triton.__version__, torch.__version__, repr(config), arguments.card, str(arguments.capability)]
    facts += [str(arguments.block_tokens), str(arguments.sequences_max), arguments.weights, arguments.kv_dtype]
    digest = hashlib.sha256("\n".join(facts).encode() + b"".join(path.read_bytes() for path in sources))
    digest.update(Path(gpu.__file__).read_bytes() + Path(sys.modules[GpuRunner.__module__].__file__ or "").read_bytes())
    return Path(knobs.cache.dir) / f"headway-{digest.hexdigest()[:32]}"


def main() -> int:
    """Compile what is not compiled yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("card")
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--block-tokens", type=int, default=GPU_BLOCK_TOKENS)
    parser.add_argument("--sequences-max", type=int, default=GPU_SEQUENCES_MAX)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default=KV_DTYPES[0])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    started = time.perf_counter()
    logging.disable(logging.WARNING)  # the self-check fails where nothing runs
    config = Shard(0, arguments.ranks).config(model_config.read(arguments.model))
    mark = stamp(arguments, config)
    if mark.exists():
        return 0
    driver.set_active(Absent(arguments.capability))
    facts = (arguments.card, arguments.block_tokens, arguments.sequences_max)
    kinds = {"has_fp8_weights": arguments.weights == "fp8", "is_kv_fp8": arguments.kv_dtype == "fp8"}
    wanted = specials(config, *facts, **kinds)
    listed = time.perf_counter() - started
    taken = compile_all(wanted, arguments.jobs)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    print(
        f"{len(wanted)} kernels in {time.perf_counter() - started:.1f} s by {arguments.jobs} processes "
        f"({listed:.1f} s to list them; the longest took {max(taken):.1f} s, all together {sum(taken):.1f} s)",
        file=sys.stderr,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
