"""Property tests search anew at home and by night; CI repeats one fixed search, so that red means changed.

Where no CUDA driver is, Triton's kernels run under its interpreter: Triton reads the switch when it is imported, and
torch imports it, so the switch lies this high."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
