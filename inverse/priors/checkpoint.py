"""Prior files: safetensors with a prior card inside, and the prior that they hold.

A checkpoint holds float16 weights, the network's shape and a :class:`PriorCard` as JSON in the
file's metadata.  Nothing in it is code; pickled checkpoints are refused.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inverse.errors import CheckpointError
from inverse.priors.denoiser import Denoiser, expand
from inverse.priors.energy import EnergyPrior, edm_energy
from inverse.priors.network import NetworkConfig, UNet, edm_denoise, position_channels
from inverse.sde import SDE, VE, as_time

__all__ = [
    "NetworkEnergyPrior",
    "NetworkPrior",
    "PriorCard",
    "list_priors",
    "load_prior",
    "save_prior",
    "update_card",
    "write_tensors",
]

WEIGHTS = Path(__file__).parent / "weights"
_FORMAT = "recon-sde prior 1"


@dataclass(frozen=True)
class PriorCard:
    """What a prior is, what it saw, and where it may be trusted.

    Attributes:
        name: name of the prior.
        modality: ``"CT"`` or ``"MR"``.
        unit: physical unit of ``offset`` and ``scale``: ``"HU"``, or ``"relative"`` for MR, where
            1 is the percentile of the image that reconstruction estimates from the data.
        offset: physical value of prior value 0.
        scale: physical units per prior unit.
        value_range: smallest and largest physical value in training.
        pixel_mm_range: smallest and largest pixel size in training, mm.
        shape: image matrix of training.
        sigma_range: noise levels of training, prior units.
        training_data: one entry a source: name, licence, patients, slices, citation.
        training: command, seed, steps, minutes, hardware and validation losses.
        limits: known failures, in plain sentences.
        sha256: hash of the weights (see :func:`save_prior`).
        network: what the network's output means: ``"score"`` (a denoiser) or ``"energy"``.
        orientation: plane of the training images, ``"axial"``, ``"coronal"`` or ``"sagittal"``;
            empty where it was not recorded.
        calibration: what was measured on held-out patients, one entry a setting; written and read
            by :class:`inverse.trust.CardCalibration`.
    """

    name: str
    modality: str
    unit: str
    offset: float
    scale: float
    value_range: tuple[float, float]
    pixel_mm_range: tuple[float, float]
    shape: tuple[int, int]
    sigma_range: tuple[float, float]
    training_data: tuple[Mapping[str, Any], ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    sha256: str = ""
    network: Literal["score", "energy"] = "score"
    orientation: str = ""
    calibration: tuple[Mapping[str, Any], ...] = ()


class NetworkPrior(Denoiser):
    """A trained network as a :class:`Denoiser`, under any SDE.

    Args:
        net: the network.
        card: its card.
        sde: forward process; default VE over the noise levels of training (over a tenth to
            either side of a single level).
        pixel_mm: pixel size of the images at hand, mm; see :meth:`at`.
        dtype: arithmetic of the network; ``None`` takes bfloat16 where the processor has it.

    Images are ``(b, h, w)`` for one channel and ``(b, 2, h, w)`` for complex ones.
    """

    def __init__(
        self,
        net: UNet,
        card: PriorCard,
        sde: SDE | None = None,
        pixel_mm: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        low, high = card.sigma_range
        own = VE(low, high) if low != high else VE(low / 1.1, high * 1.1)
        super().__init__(own if sde is None else sde)
        self.net = net.channels_last().eval().requires_grad_(False)
        self.card = card
        self.offset, self.scale = card.offset, card.scale
        self.unit = "HU" if card.unit == "HU" else "relative"
        self.pixel_mm = net.config.pixel_mm if pixel_mm is None else pixel_mm
        self.dtype = dtype

    def at(self, *, pixel_mm: float | None = None, sde: SDE | None = None) -> NetworkPrior:
        """The same network (shared weights) for another pixel size or SDE."""
        other = copy.copy(self)
        other.pixel_mm = self.pixel_mm if pixel_mm is None else pixel_mm
        other.sde = self.sde if sde is None else sde
        return other

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """``E[x_0 | x_t]``: one call of the network."""
        alpha, sigma = self.sde.marginal(t)
        level = (sigma / alpha).to(device=x_t.device).expand(x_t.shape[0])
        out = self._call(edm_denoise, x_t / expand(alpha, x_t), level)
        return out[:, 0] if self.net.config.channels == 1 else out

    def _call(self, function: Callable[..., Tensor], x: Tensor, sigma: Tensor) -> Tensor:
        """``edm_denoise`` or ``edm_energy`` of the network at this pixel size."""
        pixel = torch.full((x.shape[0],), self.pixel_mm, device=x.device)
        position = position_channels((x.shape[-2], x.shape[-1]), x.device)
        dtype = _best_dtype(x.device) if self.dtype is None else self.dtype
        images = x[:, None] if self.net.config.channels == 1 else x
        return function(self.net, images, sigma, pixel, position, dtype)

    def error(self, noise_level: float | Tensor) -> Tensor:
        """Held-out RMSE of the card, interpolated in log-log; the default without one."""
        losses = self.card.training.get("validation_rmse")
        level = as_time(noise_level)
        if not losses:
            return super().error(level)
        known = np.log([[float(k), float(v)] for k, v in losses.items()])
        # at most the noise itself below the table, constant above it
        value = np.exp(np.interp(np.log(level.numpy()), known[:, 0], known[:, 1]))
        return torch.minimum(torch.from_numpy(np.asarray(value)), level)


class NetworkEnergyPrior(EnergyPrior, NetworkPrior):
    """A trained network as an :class:`~inverse.priors.EnergyPrior`; see ``NetworkPrior``.

    Its arithmetic is float32 unless ``dtype`` says otherwise, so that the score stays the
    gradient of the energy to rounding.
    """

    def __init__(
        self,
        net: UNet,
        card: PriorCard,
        sde: SDE | None = None,
        pixel_mm: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(net, card, sde, pixel_mm, torch.float32 if dtype is None else dtype)

    def energy(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Energy of images at noise levels ``sigma``, ``(b,)``; one call of the network."""
        return self._call(edm_energy, x, sigma)


_KINDS: Mapping[str, type[NetworkPrior]] = {"score": NetworkPrior, "energy": NetworkEnergyPrior}


def _best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if device.type == "cpu" and native else torch.float32


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def save_prior(path: str | Path, net: UNet, card: PriorCard) -> PriorCard:
    """Write weights (float16), network shape and card; the file is complete or absent.

    It is on disk when this returns, also should the power fail.

    Returns:
        The card with the hash of the weights filled in.
    """
    path = Path(path)
    tensors = {
        name: value.detach().cpu().to(torch.float16).contiguous()
        for name, value in net.state_dict().items()
    }
    return _write(path, tensors, net.config, dataclasses.replace(card, sha256=_hash(tensors)))


def update_card(name_or_path: str | Path, **fields: Any) -> PriorCard:
    """Replace fields of a prior's card in its file, without touching the weights; atomic.

    Args:
        name_or_path: a bundled name or a prior file.
        fields: fields of :class:`PriorCard` but ``sha256``, which belongs to the weights.

    Returns:
        The card as it was written.

    Raises:
        CheckpointError: as :func:`load_prior`, or a field that a card does not have.
    """
    path = _path(name_or_path)
    tensors, config, card = _read(path)
    unknown = set(fields) - ({f.name for f in dataclasses.fields(PriorCard)} - {"sha256"})
    if unknown:
        raise CheckpointError(
            f"a prior card has no field {', '.join(sorted(unknown))} to replace; see PriorCard"
        )
    return _write(path, tensors, config, dataclasses.replace(card, **fields))


def _write(
    path: Path, tensors: Mapping[str, Tensor], config: NetworkConfig, card: PriorCard
) -> PriorCard:
    """A prior file, complete or absent; its card as it reads back."""
    metadata = {
        "format": _FORMAT,
        "network": json.dumps(asdict(config)),
        "card": json.dumps(asdict(card)),
    }
    write_tensors(path, tensors, metadata)
    return _card(metadata["card"])


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file that is complete or absent, also should the power fail or the disk fill.

    Args:
        path: the file; its folder is made.
        tensors: what it holds, by name.
        metadata: texts in its header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(dict(tensors), temporary, dict(metadata))
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _card(text: str) -> PriorCard:
    """A card from its JSON (which has lists for tuples)."""
    values = json.loads(text)
    for f in dataclasses.fields(PriorCard):
        if isinstance(values.get(f.name), list):
            values[f.name] = tuple(values[f.name])
    return PriorCard(**values)


def _path(name_or_path: str | Path) -> Path:
    """The file of a bundled prior's name, or the path itself."""
    path = Path(name_or_path)
    bundled = WEIGHTS / f"{name_or_path}.safetensors"
    if path.suffix == "" and not path.exists() and bundled.exists():
        return bundled
    if path.suffix in {".pt", ".pth", ".ckpt", ".pkl"}:
        raise CheckpointError(
            f"prior '{path.name}' is a pickled checkpoint, which can run code when loaded; "
            "give a .safetensors file written by 'recon train'"
        )
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in WEIGHTS.glob("*.safetensors"))) or "none"
        raise CheckpointError(
            f"no prior '{name_or_path}'; give a bundled name ({names}) or a .safetensors file"
        )
    return path


def _read(path: Path) -> tuple[dict[str, Tensor], NetworkConfig, PriorCard]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(
                    f"'{path.name}' is not a prior of this toolkit (format "
                    f"'{metadata.get('format', 'missing')}', expected '{_FORMAT}'); "
                    "train one with 'recon train'"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        network = json.loads(metadata["network"])
        network["widths"] = tuple(network["widths"])
        return tensors, NetworkConfig(**network), _card(metadata["card"])
    except CheckpointError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"prior file '{path.name}' cannot be read ({type(error).__name__}); it is truncated "
            "or not a safetensors prior; restore it or train it again"
        ) from error


def load_prior(
    name_or_path: str | Path, *, sde: SDE | None = None, dtype: torch.dtype | None = None
) -> NetworkPrior:
    """Load a bundled prior by name, or a prior file, and verify its hash.

    Raises:
        CheckpointError: missing, pickled, truncated, foreign, or changed since it was written.
    """
    path = _path(name_or_path)
    tensors, config, card = _read(path)
    if _hash(tensors) != card.sha256:
        raise CheckpointError(
            f"prior file '{path.name}' does not match its own sha256 {card.sha256[:12]}...; its "
            "weights were changed or damaged; restore the file"
        )
    net = UNet(config)
    try:
        net.load_state_dict({name: value.float() for name, value in tensors.items()})
    except RuntimeError as error:
        raise CheckpointError(
            f"prior file '{path.name}' holds weights that do not fit its network description; "
            "restore the file"
        ) from error
    if card.network not in _KINDS:
        raise CheckpointError(
            f"prior file '{path.name}' holds a network of kind '{card.network}', expected one of "
            f"{', '.join(_KINDS)}; load it with the version that wrote it"
        )
    return _KINDS[card.network](net, card, sde, dtype=dtype)


def list_priors() -> list[PriorCard]:
    """Cards of the bundled priors, by name."""
    return [_read(path)[2] for path in sorted(WEIGHTS.glob("*.safetensors"))]
