"""deepinv's posterior samplers on the same problem: ``python -m phantoms.benchmarks.rivals``.

Same denoiser, operator, data and noise; 23-view CT by default.  DiffPIR, DPS, ΠGDM and
MomentMatching of deepinv 0.5 run with every weight of a grid on tuning slices, the best weight
then on test slices of other patients, at the same number of network calls as ours and at five
times as many.  deepinv is not a dependency: ``pip install 'deepinv<0.6'`` for this script.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inverse.errors import UnsupportedError
from inverse.metrics import psnr
from inverse.posterior.plug_and_play import warm_start
from inverse.priors import NetworkPrior, load_prior
from inverse.reconstruct import reconstruct
from phantoms.benchmarks.problems import Case, Settings, ct_case

WEIGHTS = {
    "DiffPIR": (0.01, 0.1, 1.0, 10.0, 100.0),
    "DPS": (1e-5, 1e-4, 1e-3, 1e-2, 0.1),
    "PiGDM": (0.3, 1.0, 3.0),
    "MomentMatching": (0.3, 1.0, 3.0),
}
"""Weights tried for each rival on the tuning slices."""
LEVELS = (10.0, 0.02)
"""Noise levels between which the rivals' SDE runs, prior units."""
RANGE = (-1.05, 5.0)
"""Prior values that DiffPIR's image range [0, 1] stands for; it clips outside."""

Rival = Callable[[float, int], Tensor]


def rivals(case: Case, prior: NetworkPrior) -> dict[str, Rival]:
    """Each rival on a case: ``(weight, calls) -> images in prior units``."""
    try:
        import deepinv
    except ImportError as error:
        raise UnsupportedError(
            "deepinv is not installed; run pip install 'deepinv<0.6' to compare with it"
        ) from error
    from deepinv.optim.data_fidelity import L2
    from deepinv.physics import GaussianNoise, LinearPhysics
    from deepinv.sampling import (
        AncestralSolver,
        DiffPIR,
        DPSDataFidelity,
        MomentMatchingDataFidelity,
        PiGDMDataFidelity,
        PosteriorDiffusion,
        VarianceExplodingDiffusion,
    )

    white = case.inner.whitened()
    start = warm_start(case.inner, case.offset, case.scale)

    def physics(scale: float) -> Any:
        """Our operator, whitened, on images ``(b, 1, h, w)`` in units of ``scale``."""

        class Ours(LinearPhysics):
            def A(self, x: Tensor, **_: Any) -> Tensor:
                return scale * white.operator(x[:, 0].float())[:, None]

            def A_adjoint(self, y: Tensor, **_: Any) -> Tensor:
                return scale * white.operator.adjoint(y[:, 0].float())[:, None]

        return Ours(noise_model=GaussianNoise(sigma=1.0))

    class Denoise(deepinv.models.Denoiser):
        """Our denoiser on images in ``low + width * image``."""

        def __init__(self, low: float, width: float) -> None:
            super().__init__()
            self.low, self.width = low, width

        def forward(self, x: Tensor, sigma: Any, **_: Any) -> Tensor:
            level = torch.as_tensor(sigma, dtype=torch.float64).flatten()[0]
            low, high = (float(prior.sde.noise_level(end)) for end in (0.0, 1.0))
            t = prior.sde.time((self.width * level).clamp(low, high))
            u = self.low + self.width * x[:, 0]
            return ((prior.denoise(u.float(), t) - self.low) / self.width)[:, None].to(x)

    def diffpir(weight: float, calls: int) -> Tensor:
        low, width = RANGE[0], RANGE[1] - RANGE[0]
        model = DiffPIR(
            Denoise(low, width), L2(), sigma=1.0, max_iter=calls, zeta=1.0, lambda_=weight
        )
        shift = white.operator(torch.full_like(start, low))
        y = (white.data - shift)[:, None]
        out = model(y, physics(width), seed=1, x_init=((start - low) / width)[:, None])
        return low + width * out[:, 0]

    def posterior(fidelity: Any, weight: float, calls: int) -> Tensor:
        sde = VarianceExplodingDiffusion(
            sigma_min=LEVELS[1], sigma_max=LEVELS[0], alpha=1.0, dtype=torch.float32
        )
        # one call of the denoiser a step and one for the output
        solver = AncestralSolver(timesteps=torch.linspace(1.0, 0.0, calls).numpy())
        model = PosteriorDiffusion(
            data_fidelity=fidelity(weight=weight),
            denoiser=Denoise(0.0, 1.0),
            sde=sde,
            solver=solver,
            dtype=torch.float32,
            minus_one_one=False,
        )
        x = model(
            white.data[:, None], physics(1.0), x_init=(len(white.data), 1, *start.shape[1:]),
            seed=1,
        )  # fmt: skip
        return x[:, 0].float()

    def dps(**options: Any) -> Any:
        return DPSDataFidelity(guidance="annealed", **options)

    return {
        "DiffPIR": diffpir,
        "DPS": lambda w, n: posterior(dps, w, n),
        "PiGDM": lambda w, n: posterior(PiGDMDataFidelity, w, n),
        "MomentMatching": lambda w, n: posterior(MomentMatchingDataFidelity, w, n),
    }


def _psnr(case: Case, prior_units: Tensor) -> float:
    """PSNR of an image in prior units, as in the other tables."""
    physical = case.offset + case.scale * prior_units
    return float(np.mean(psnr(case.display(physical), case.truth, data_range=case.data_range,
                              mask=case.mask)))  # fmt: skip


def main() -> None:
    """Tune, test, print the table; write JSON with ``--out``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tune", type=Path, required=True, help="CT series for tuning")
    parser.add_argument("--test", type=Path, required=True, help="CT series of other patients")
    parser.add_argument("--prior", default="ct-small")
    parser.add_argument("--views", type=int, default=23)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--slices", type=int, default=2, help="slices of each series")
    parser.add_argument("--only", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    prior = load_prior(arguments.prior)
    rows: list[dict[str, Any]] = []
    cases = {}
    for part, path in (("tune", arguments.tune), ("test", arguments.test)):
        own = Settings(arguments.slices, 256, methods=("pnp_admm:20",), data=str(path))
        cases[part] = ct_case(own, prior, arguments.views, 1e5)
    ours = cases["test"]
    for calls in (8, arguments.calls):
        started = time.monotonic()
        result = reconstruct(ours.measurement, prior, method="pnp_admm", steps=calls)
        value = float(np.mean(psnr(ours.display(result.mean), ours.truth,
                                   data_range=ours.data_range, mask=ours.mask)))  # fmt: skip
        seconds = time.monotonic() - started
        rows.append({"method": f"ours ({result.settings['method']})", "calls": calls,
                     "weight": None, "psnr": value, "seconds": seconds})  # fmt: skip
        _show(rows[-1])
    tuning, test = rivals(cases["tune"], prior), rivals(ours, prior)
    for name in arguments.only:
        weights = WEIGHTS[name]
        for calls in (arguments.calls, 5 * arguments.calls):
            found = {w: _psnr(cases["tune"], tuning[name](w, calls)) for w in weights}
            best = max(weights, key=lambda w: float(np.nan_to_num(found[w], nan=-np.inf)))
            started = time.monotonic()
            value = _psnr(ours, test[name](best, calls))
            rows.append({"method": f"deepinv {name}", "calls": calls, "weight": best,
                         "psnr": value, "seconds": time.monotonic() - started,
                         "tuning": found})  # fmt: skip
            _show(rows[-1])
            if arguments.out:
                arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


def _show(row: dict[str, Any]) -> None:
    weight = "" if row["weight"] is None else f"weight {row['weight']:g}"
    print(f"{row['method']:26} {row['calls']:4} calls {row['psnr']:7.2f} dB {weight:12} "
          f"{row['seconds']:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
