"""Every kernel of engine/kernels against its oracle and against its floor, on the GPU at hand.

    python3 bench/gpu_micro.py [--sections linear,attend,prefill,sample,rows] [--weights fp8] [--out DIR]

Owns the sections of sampling and rows, and the command. Writes DIR/gpu_micro.json and the tuned table it found, prints
its tables last."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse

import torch

from bench.gpu_attention import SHAPES, Pool, attend_section, prefill_section
from bench.gpu_products import all_choices, compile_all, product_section, summary, tuned_table
from bench.gpu_timing import BF16, CUDA, ceilings, microseconds, precompile
from engine.config import WEIGHTS
from engine.kernels import paged, ref, rows
from engine.kernels.sample import Knobs, Sampler
from engine.kernels.tuned import slug

LIMITS = {
    "greedy": (0.0, 0, 1.0, 0.0), "temperature": (0.6, 0, 1.0, 0.0), "top-k 50": (1.0, 50, 1.0, 0.0),
    "top-p 0.9": (1.0, 0, 0.9, 0.0), "k 20 p 0.95": (0.6, 20, 0.95, 0.0), "min-p 0.05": (1.0, 0, 1.0, 0.05),
}  # fmt: skip


def sample_section(_models: list[str], deadline_s: float) -> dict[str, Any]:
    """Whole rows of 128,256: peaked logits (as a trained model's) and flat ones (the search over whole rows)."""
    table: list[list[Any]] = []
    vocab = 128256
    for batch in (1, 8, 64, 256):
        for spread in (4.0, 0.2):
            logits = torch.randn(batch, vocab, device=CUDA) * spread
            if spread == 4.0:
                logits[:, :40] += 14.0
            sampler, cell = Sampler.make(batch, vocab, CUDA), {}
            for name, limits in LIMITS.items():
                if time.time() > deadline_s:
                    return {"sample": table}
                columns = [torch.full((batch,), value, device=CUDA) for value in limits]
                knobs = Knobs(
                    columns[0].float(),
                    columns[1].int(),
                    columns[2].float(),
                    columns[3].float(),
                    torch.rand(batch, device=CUDA),
                )
                ids, bad = sampler.choose(logits, knobs)
                some = range(0, batch, max(1, batch // 8))
                wanted = [ref.sample(logits[row], *limits, float(knobs.uniform[row])) for row in some]
                agree = sum(int(ids[row]) == want for row, want in zip(some, wanted, strict=True))
                time_us = microseconds([lambda k=knobs: sampler.choose(logits, k)] * 3)
                cell[name] = [round(time_us, 1), f"{agree}/{len(wanted)}", int(bad.sum())]
            cell["torch argmax"] = [round(microseconds([lambda: logits.argmax(-1)] * 3), 1)]
            table.append([batch, spread, cell])
            print(
                "sample",
                batch,
                "spread",
                spread,
                "floor",
                round(logits.numel() * 4 / ceilings().read_bytes_s * 1e6, 1),
                cell,
                flush=True,
            )
    return {"sample": table}


def rows_section(_models: list[str], _deadline_s: float) -> dict[str, Any]:
    """The small kernels of large steps, and the embedding."""
    table: list[list[Any]] = []
    pool = Pool(SHAPES["8b"], 4)
    for count in (1, 64, 256, 2048):
        x, both = torch.randn(count, 4096, device=CUDA, dtype=BF16), torch.randn(count, 28672, device=CUDA, dtype=BF16)
        out, mid = torch.empty_like(x), torch.empty(count, 14336, device=CUDA, dtype=BF16)
        embedding = torch.randn(128256, 4096, device=CUDA, dtype=BF16)
        ids = torch.randint(0, 128256, (count,), device=CUDA, dtype=torch.int32)
        step = pool.step([count], [count])
        qkv = torch.randn(count, 6144, device=CUDA, dtype=BF16)
        frequencies = torch.rand(64, device=CUDA)
        row = {
            "norm": microseconds([lambda: rows.rms_norm(x, out, 1e-5)] * 20),
            "gated": microseconds([lambda: rows.gated(both, mid)] * 20),
            "rope_write": microseconds(
                [
                    lambda n=n: paged.run_rope_write(pool.shape, step, 0, qkv, pool.layer(n), None, None)
                    for n in range(20)
                ]
            ),
            "embed": microseconds([lambda: rows.embed_into(ids, ids, embedding, frequencies, x, step.turns)] * 20),
        }
        table.append([count, {name: round(value, 2) for name, value in row.items()}])
        print("rows", count, table[-1][1], flush=True)
    return {"rows": table}


SECTIONS = {"linear": product_section, "attend": attend_section, "prefill": prefill_section,
            "sample": sample_section, "rows": rows_section}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", default="attend,prefill,sample,rows,linear")
    parser.add_argument("--models", default="8b,0.6b,8b/2")
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16", help="of the products")
    parser.add_argument("--compile")
    options = parser.parse_args()
    is_fp8 = options.weights == "fp8"
    if options.compile:
        number, of = options.compile.split("/")
        compile_all(all_choices(is_fp8=is_fp8)[int(number) :: int(of)], is_fp8=is_fp8)
        return
    started = time.time()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    Path(options.out).mkdir(parents=True, exist_ok=True)
    sections = options.sections.split(",")
    if "linear" in sections:
        found["compile_s"] = round(
            precompile(__file__, max(1, (os.cpu_count() or 2) - 1), "--weights", options.weights), 1
        )
        print("compiled", len(all_choices(is_fp8=is_fp8)), "product kernels in", found["compile_s"], "s", flush=True)
    for section in sections:
        begun = time.time()
        try:
            run = partial(product_section, is_fp8=is_fp8) if section == "linear" else SECTIONS[section]
            found |= run(options.models.split(","), started + options.seconds)
        except Exception as problem:  # border: one section's failure must not lose the others' figures  # noqa: BLE001
            found[section + "_failed"] = repr(problem)[:500]
            import traceback

            traceback.print_exc()
        print(f"[{section}: {time.time() - begun:.0f} s, {time.time() - started:.0f} s in all]", flush=True)
        (Path(options.out) / "gpu_micro.json").write_text(json.dumps(found, default=str))
    if "products" in found:
        path = Path(options.out) / f"{slug(found['device'])}.json"
        path.write_text(json.dumps(tuned_table(found["products"]), indent=1))
        summary(found["products"])


if __name__ == "__main__":
    main()
