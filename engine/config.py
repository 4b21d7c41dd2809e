"""What one worker process is told: the frozen settings of `python -m engine worker` and `fake`, with their defaults.

Owns defaults and their reasons. Never reads files or the environment."""

from __future__ import annotations

from dataclasses import dataclass

from policies.costs import StepModel


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One worker."""

    socket: str
    name: str = "w0"
    model: str = ""  # a folder, a GGUF file, or the embedded model's name
    model_name: str = ""  # as clients ask for it; empty: the model's own
    device: str = "cpu"  # cpu | cuda | cuda:N | auto: cuda if there is one
    threads: int = 1
    weights: str = "bf16"  # of a layer's projections on a GPU; fp8: half the bytes, a scale a row, and other answers
    tensor_parallel: int = 1  # ranks that hold a part of the model each: this card and the next ones, or processes
    has_one_shot: bool = True  # sums over cards by one kernel for few rows; else NCCL's
    block_tokens: int = 16  # 64 on a GPU
    kv_dtype: str = "bf16"  # one of KV_DTYPES: fp8 holds nearly twice the tokens and moves logits (docs/gpu.md)
    kv_bytes: int = 512 * 1024 * 1024  # 11,600 tokens of SmolLM2-135M in float32: its whole context and room beside it
    ahead_tokens: int = 0  # 1 on a GPU: the next step is launched before this one's tokens are known
    sequences_max: int = 256
    has_drafts: bool = True  # prompt lookup (engine/scheduling/speculate.py), on the CPU
    policy: str = "headway"  # which EnginePolicy fills the steps, by name or module:factory
    waiting_max: int = 1024
    calibrate_s: float = 1.0
    drain_s: float = 30.0  # on SIGTERM
    links_max: int = 16
    send_s: float = 30.0  # a link that takes nothing for so long is cut
    pool_fd: int = -1  # of the host pool, from the keeper; below 0: none
    pool_share: int = 1  # workers that share it: each leases its part
    disk_dir: str = ""  # where KV files go; empty: nowhere
    disk_bytes: int = 0  # of this worker

    @property
    def has_fp8_weights(self) -> bool:
        """Whether a layer's projections are of 8 bits."""
        return self.weights == "fp8"


WEIGHTS = ("bf16", "fp8")
KV_DTYPES = ("bf16", "fp8")  # of a GPU worker's KV; a CPU's is float32
GPU_BLOCK_TOKENS = 64  # what the kernels' tiles are made for
GPU_SEQUENCES_MAX = 256  # the largest bucket of decode rows (engine/compute/arrange.py)
GPU_ROWS_MAX = 4096  # of a step: 100 ms of an 8B model, and what a newcomer waits at most; fewer steps mix better
GPU_CALIBRATE_S = 0.5  # three rounds of an 8B model's 11 shapes: as many steps as its model takes to be warm
GPU_KV_BYTES = 0  # all that is free beside the weights

# Order of magnitude of a small model on one CPU core; a second of calibration replaces it. Every term must be positive:
# coefficients are learned as multiples of these.
PRIOR = StepModel(
    floor_s=10e-3, row_s=1e-3, base_s=3e-3, decode_context_s=1e-6, chunk_context_s=2e-7, sequence_s=0.2e-3
)
# The same for an 8B model on an H100: 5 ms of weights, 24 us a row of prompt, 41 ns a token of KV read (micro figures).
GPU_PRIOR = StepModel(
    floor_s=5e-3, row_s=25e-6, base_s=0.4e-3, decode_context_s=4.5e-8, chunk_context_s=2e-9, sequence_s=5e-6
)
