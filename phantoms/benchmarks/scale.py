"""What a volume costs: ``python -m phantoms.benchmarks.scale --out FILE.json``.

Reconstructs phantom volumes of several lengths by ``recon reconstruct``, a process each, and
records seconds by phase and the peak memory; then a volume by one process and by two under
``torchrun``, one thread each.  From these follow the slope of the cost, how memory grows, and the
efficiency of two processes, ``T_1 / (2 T_2)`` in the sampling phase.  The last two mean something
on a machine that is otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inverse.io.measurement_file import write_measurement
from inverse.operators.ct import ParallelBeam
from phantoms.anatomy import AIR_HU, thorax
from phantoms.simulate import simulate_ct

FIELD_MM = 360.0
SPACING_MM = 2.0


def write_scan(path: Path, slices: int, side: int, views: int) -> None:
    """A measurement file of a phantom chest."""
    body, pixel = thorax(55), FIELD_MM / side
    heights = [(k - (slices - 1) / 2) * SPACING_MM for k in range(min(slices, 8))]
    images = [AIR_HU + body.slab(z, SPACING_MM, 1).image((side, side), pixel) for z in heights]
    # the cost of a slice does not depend on what it shows
    volume = np.stack([images[k % len(images)] for k in range(slices)]).astype(np.float32)
    geometry = ParallelBeam.sparse(views, (side, side), pixel)
    scan = simulate_ct(volume, pixel, geometry, matrix=side)
    z_mm = [SPACING_MM * k for k in range(slices)]
    write_measurement(path, scan.measurement, z_mm=z_mm)


_LAUNCH = """
import resource, subprocess, sys

code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""Starts a command from a small process, since a child counts the memory of its parent as its own
until it runs another program."""


def measure(
    scan: Path, folder: Path, options: Sequence[str], processes: int, threads: int
) -> dict[str, Any]:
    """One run: wall-clock seconds, seconds by phase, and the largest process's peak memory."""
    out = folder / f"out-{time.monotonic_ns()}"
    launcher = [sys.executable, "-m", "recon_cli.app"]
    if processes > 1:
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(processes), "-m", "recon_cli.app",
        ]  # fmt: skip
    words = [*launcher, "reconstruct", str(scan), "-o", str(out), "--quiet", *options]
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCH, *words],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"'{' '.join(words)}' ended with code {done.returncode}")
    run = json.loads((out / "run.json").read_text())
    return {
        "processes": processes,
        "seconds": round(time.monotonic() - started, 2),
        "peak_mib": int(done.stdout) // 1024,
        "phases": run["timings_seconds"],
    }


def main() -> None:
    """Print a row a run; JSON in ``--out``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--slices", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--views", type=int, default=23)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--coupling", default="none")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument(
        "--processes", type=int, default=2, help="of the last run; 1 leaves it out"
    )
    parser.add_argument("--quick", action="store_true", help="8 and 16 slices, 2 network calls")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    lengths = [8, 16] if arguments.quick else arguments.slices
    steps = 2 if arguments.quick else arguments.steps
    options = ["--steps", str(steps), "--coupling", arguments.coupling]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = [(n, 1) for n in lengths]
        if arguments.processes > 1:
            counts.append((lengths[-1], arguments.processes))
        for slices, processes in counts:
            scan = folder / f"{slices}.h5"
            if not scan.exists():
                write_scan(scan, slices, arguments.side, arguments.views)
            row = {
                "slices": slices,
                **measure(scan, folder, options, processes, arguments.threads),
            }
            rows.append(row)
            phases = ", ".join(f"{k} {v:.1f}" for k, v in row["phases"].items())
            print(
                f"{slices:4} slices, {processes} processes: {row['seconds']:.1f} s, peak "
                f"{row['peak_mib']} MiB; {phases}",
                flush=True,
            )
    alone = [row for row in rows if row["processes"] == 1]
    result: dict[str, Any] = {
        "setting": {
            "side": arguments.side,
            "views": arguments.views,
            "steps": steps,
            "coupling": arguments.coupling,
            "threads": arguments.threads,
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
        "rows": rows,
    }
    if len(alone) > 1:
        n, t, m = (
            np.array([pick(row) for row in alone], float)
            for pick in (
                lambda r: r["slices"],
                lambda r: r["phases"]["prior"],
                lambda r: r["peak_mib"],
            )
        )
        slope, offset = np.polyfit(n, t, 1)
        result |= {
            "seconds_a_slice": float(slope),
            "seconds_at_none": float(offset),
            "mib_a_slice": float(np.polyfit(n, m, 1)[0]),
            "peak_last_over_first": float(m[-1] / m[0]),
        }
    if rows[-1]["processes"] > 1:
        one, many = alone[-1]["phases"]["prior"], rows[-1]["phases"]["prior"]
        result["efficiency"] = one / (rows[-1]["processes"] * many)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main()
