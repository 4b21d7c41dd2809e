"""Products with a fixed weight on one core with AVX-512: a C function of ours, compiled once by the system's compiler.

Owns the compiled file and its call. Never required: where it cannot be had, the log says so and oneDNN computes."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from torch import Tensor

log = logging.getLogger(__name__)

WIDTH = 32  # outputs of a panel, as in panels.c
COMPILE_S = 60.0  # it takes half a second
SOURCE = Path(__file__).with_name("panels.c")
FLAGS = ("-O3", "-std=gnu11", "-mavx512f", "-ffp-contract=fast", "-shared", "-fPIC")

Product = Callable[[int, int, int, int, int, int], None]


def fits(weight: Tensor) -> bool:
    """Whether `arrange` and `product` can serve this weight here."""
    return weight.dtype == torch.float32 and weight.shape[0] % WIDTH == 0 and compiled() is not None


def arrange(weight: Tensor) -> Tensor:
    """[out, in] -> [out / 32, in, 32], the form that `product` reads from front to back."""
    return weight.view(-1, WIDTH, weight.shape[1]).transpose(1, 2).contiguous()


def product(x: Tensor, panels: Tensor) -> Tensor:
    """[rows, in] -> [rows, out]. A row's result is the same, bit for bit, whatever rows stand beside it."""
    call, x = compiled(), x.contiguous()
    assert call is not None
    assert x.dtype == torch.float32
    rows, depth, width = len(x), panels.shape[1], panels.shape[0] * WIDTH
    assert x.shape[1] == depth
    y = x.new_empty((rows, width))
    call(x.data_ptr(), panels.data_ptr(), y.data_ptr(), rows, width, depth)
    return y


@functools.cache
def compiled() -> Product | None:
    """The C function; None, and the reason in the log, where there is none."""
    try:
        return _load(_file())
    except (OSError, subprocess.SubprocessError, LookupError) as error:
        log.info("products are oneDNN's, not our own kernel's, which is faster with few rows: %s", _why(error))
        return None


def _file() -> Path:
    """The shared object for this source, compiled at its first use. Raises LookupError where it makes no sense."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise LookupError("it is written for AVX-512, which this CPU does not have")
    if torch.get_num_threads() > 1:
        raise LookupError(f"it runs on one thread, and this worker has {torch.get_num_threads()}")
    name = xxhash.xxh3_64_hexdigest(SOURCE.read_bytes() + " ".join(FLAGS).encode())
    file = _folder() / f"panels-{name}.so"
    if not file.is_file():
        _compile(file)
    return file


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "headway" / "kernels"


def _compile(file: Path) -> None:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise LookupError("there is no C compiler (cc, or what CC names)")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # several workers may start at once: a rename is whole
        made = Path(folder) / file.name
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S)
        made.replace(file)


def _load(file: Path) -> Product:
    function = ctypes.CDLL(os.fspath(file)).product
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_size_t] * 3
    function.restype = None
    call: Product = function
    return call


def _why(error: Exception) -> str:
    said = getattr(error, "stderr", None)  # a compiler's first line
    return said.splitlines()[0] if said else str(error)
