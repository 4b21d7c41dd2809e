"""Property tests search anew at home and by night; CI repeats one fixed search, so that red means changed.

Where no CUDA driver is, Triton's kernels run under its interpreter: Triton reads the switch when it is imported, and
torch imports it, so the switch lies this high."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# No test is judged by how quick this machine is just now: neither an example's 200 ms nor the drawing of one.
settings.register_profile("home", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("home"), derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "home")
if os.environ.get("CI"):
    # Else it also draws the constants of whatever modules of ours are loaded: another search in every process.
    providers._get_local_constants = providers.Constants

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
