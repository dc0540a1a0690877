"""``recon doctor``: versions, devices, optional parts, and a self-test of the operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import typer

from recon_cli.console import print_json, print_table
from recon_cli.options import Json, command
from recon_cli.runlog import versions

if TYPE_CHECKING:
    from inverse.operators.linop import LinearOperator

_OPTIONAL = {
    "jpeg_ls": "JPEG-LS compressed DICOM",
    "pylibjpeg": "JPEG and JPEG 2000 compressed DICOM",
    "openjpeg": "JPEG 2000 compressed DICOM",
    "libjpeg": "JPEG lossless compressed DICOM",
}
_TOLERANCE = 1e-4


def _operators() -> dict[str, Callable[[], LinearOperator]]:
    import torch

    from inverse.operators.ct import FanBeam, ParallelBeam, RayTransform
    from inverse.operators.mask import Mask
    from inverse.operators.mri import CartesianMRI, cartesian_mask

    shape = (32, 32)
    return {
        "CT parallel": lambda: RayTransform(ParallelBeam.sparse(12, shape, 2.0), shape, 2.0),
        "CT fan": lambda: RayTransform(FanBeam.sparse(12, shape, 2.0), shape, 2.0),
        "MRI Cartesian": lambda: CartesianMRI(cartesian_mask(shape, 4.0)),
        "mask": lambda: Mask(torch.arange(32 * 32).reshape(shape) % 3 != 0),
    }


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app, "doctor")
    def doctor(as_json: Json = False) -> None:
        """Check the installation: versions, devices, optional parts, adjoints."""
        import torch

        from inverse.errors import NumericalError
        from inverse.priors import list_priors

        devices = ["cpu"] + [
            f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())
        ]
        optional = {name: find_spec(name) is not None for name in _OPTIONAL}
        adjoints = {name: make().adjoint_error() for name, make in _operators().items()}
        priors = [card.name for card in list_priors()]
        bad = [n for n, e in adjoints.items() if not math.isfinite(e) or e > _TOLERANCE]
        if as_json:
            print_json(
                {
                    "versions": versions(),
                    "devices": devices,
                    "threads": torch.get_num_threads(),
                    "optional": optional,
                    "adjoint_errors": adjoints,
                    "priors": priors,
                    "ok": not bad,
                }
            )
        else:
            rows = [[name, value, ""] for name, value in versions().items()]
            rows += [["device", name, ""] for name in devices]
            rows += [["threads", str(torch.get_num_threads()), ""]]
            rows += [["prior", name, "bundled"] for name in priors]
            rows += [
                [name, "present" if there else "absent", f"optional: {_OPTIONAL[name]}"]
                for name, there in optional.items()
            ]
            rows += [
                [f"adjoint {name}", f"{e:.1e}", "FAILED" if name in bad else "ok"]
                for name, e in adjoints.items()
            ]
            print_table("recon doctor", ["part", "found", "remark"], rows, left=3)
        if bad:
            raise NumericalError(
                f"the adjoint of {', '.join(bad)} is wrong by more than {_TOLERANCE:g}; "
                "reinstall torch and astra-toolbox"
            )
