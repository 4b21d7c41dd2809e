"""Every kernel a GPU worker will launch, compiled beside the loading of its weights, in as many processes as cores.

Owns the rehearsal (the runner's own launches over tensors that lie nowhere, each told to this file instead of being
compiled) and the processes that compile. Never touches a GPU: what it makes is found in Triton's cache by whoever
launches it.

    python -m engine.compute.precompile MODEL_DIR "NVIDIA H100 80GB HBM3" [--capability 90] [--jobs 16]"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from engine.compute.arrange import bucket
from engine.compute.gpu_runner import GpuRunner
from engine.compute.warm import warm_captured, warm_compiled
from engine.config import GPU_BLOCK_TOKENS, GPU_SEQUENCES_MAX, KV_DTYPES, WEIGHTS
from engine.kernels import check
from engine.models import config as model_config
from engine.models import gpu
from engine.models.config import ModelConfig
from engine.models.shard import Shard

log = logging.getLogger(__name__)

NOWHERE = torch.device("meta")
DTYPE = torch.bfloat16
BLOCKS = 1 << 16  # enough that no two made-up sequences share one; the memory of the real card is not known yet


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


def nobody(_special: Special) -> None:
    """Who hears of nothing."""


class Unmade(TorchFunctionMode):
    """Random weights and cuBLAS's products, which launch no kernel of ours, are not made. Over tensors that lie nowhere
    torch would import its compiler for them, most of the time that listing took."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The output as it was."""
        if func is torch.Tensor.normal_:
            return args[0]
        if func not in (torch.mm, torch.addmm):
            return func(*args, **(kwargs or {}))
        x, weight = args[-2:]
        return kwargs["out"] if kwargs else x.new_empty(len(x), weight.shape[1])


@contextmanager
def noted(found: dict[tuple[str, str, str], Special], tell: Callable[[Special], object] = nobody) -> Iterator[None]:
    """Launches in here compile and run nothing: each new one is noted, and told at once."""

    def note(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:  # noqa: A002  # Triton's name
        special = Special(fn.module, fn.name, compile["specialization_data"])
        if special.key not in found:
            found[special.key] = special
            tell(special)
        return True

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before


def specials(
    config: ModelConfig, card: str, block_tokens: int, sequences_max: int, tell: Callable[[Special], object] = nobody,
    *, has_fp8_weights: bool = False, is_kv_fp8: bool = False,
) -> list[Special]:  # fmt: skip
    """All that a worker of this model compiles at its start on that card, as they are found: the longest come early,
    for a step with a chunk has them."""
    found: dict[tuple[str, str, str], Special] = {}
    with noted(found, tell), torch.inference_mode(), Unmade():
        weights = gpu.random_weights(config, NOWHERE, DTYPE, is_fp8=has_fp8_weights)
        weights = replace(weights, layers=weights.layers[:2])  # the first, and one for all that follow
        runner = GpuRunner(weights, block_tokens, BLOCKS, sequences_max, card=card, is_kv_fp8=is_kv_fp8)
        for batch in warm_compiled(block_tokens, bucket(sequences_max), config.context_max):
            runner.rehearse(batch)
        for batch in warm_captured(block_tokens, BLOCKS, bucket(sequences_max), config.context_max):
            runner.rehearse(batch)
    shape = gpu.shape_of(config, block_tokens, is_kv_fp8=is_kv_fp8)
    with noted(found, tell), torch.inference_mode():
        check.failures(torch.device("cpu"), DTYPE, shape, has_fp8=weights.has_fp8)  # it fails: nothing ran
    return list(found.values())


def compiled(special: Special) -> Any:
    """Triton's compiled kernel, made now or found in its cache, and the C code that launches it."""
    kernel = getattr(importlib.import_module(special.module), special.kernel).preload(special.data)
    bind(kernel)
    return kernel


def bind(kernel: Any) -> None:
    """Have the launcher of a kernel's signature in Triton's cache. Triton 3.6 has a C compiler make one for each, 0.3 s
    of gcc, when a kernel is first launched: 15 of an 8B model's start, one after the other. Later ones share one."""
    if hasattr(nvidia, "make_launcher"):
        try:
            nvidia.CudaLauncher(kernel.src, kernel.metadata)
        except Exception as error:  # border: no libcuda, no C compiler; then a launch says it better  # noqa: BLE001
            log.debug("no launcher was made: %s", error)


def seconds(special: Special) -> float:
    """How long that took."""
    started = time.perf_counter()
    compiled(special)
    return time.perf_counter() - started


def compile_found(find: Callable[[Callable[[Special], object]], object], jobs: int) -> list[float]:
    """Seconds of each kernel that `find` tells of, compiled while it goes on finding. Raises what the compiler
    raises."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        pool.submit(os.getpid).result()  # all are forked here, before this process has imported more
        coming: list[Future[float]] = []
        find(lambda special: coming.append(pool.submit(seconds, special)))
        return [one.result() for one in coming]


def stamp(arguments: argparse.Namespace, config: ModelConfig) -> Path:
    """A file in Triton's cache that says: all of this is made."""
    sources = sorted(Path(gpu.__file__).parents[1].glob("kernels/**/*.*[ny]"))  # .py and .json
    facts = [triton.__version__, torch.__version__, repr(config), arguments.card, str(arguments.capability)]
    facts += [str(arguments.block_tokens), str(arguments.sequences_max), arguments.weights, arguments.kv_dtype]
    digest = hashlib.sha256("\n".join(facts).encode() + b"".join(path.read_bytes() for path in sources))
    for path in (
        gpu.__file__,
        *(sys.modules[one.__module__].__file__ or "" for one in (GpuRunner, warm_captured)),
        __file__,
    ):
        digest.update(Path(path).read_bytes())
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
    kinds = {"has_fp8_weights": arguments.weights == "fp8", "is_kv_fp8": arguments.kv_dtype == "fp8"}
    listed: list[float] = []

    def find(tell: Callable[[Special], object]) -> None:
        specials(config, arguments.card, arguments.block_tokens, arguments.sequences_max, tell, **kinds)
        listed.append(time.perf_counter() - started)

    taken = compile_found(find, arguments.jobs)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    print(
        f"{len(taken)} kernels in {time.perf_counter() - started:.1f} s by {arguments.jobs} processes "
        f"({listed[0]:.1f} s to list them; the longest took {max(taken):.1f} s, all together {sum(taken):.1f} s)",
        file=sys.stderr,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
