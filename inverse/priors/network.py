r"""One U-Net, with EDM preconditioning, usable under every SDE.

A network :math:`F_\theta` is trained once for the noise on :math:`x_t/\alpha`, whose level is
:math:`\tilde\sigma = \sigma/\alpha`; the denoiser is

.. math::
   D(x, \tilde\sigma) = c_{skip} x + c_{out} F_\theta(c_{in} x;\ \tfrac14 \ln \tilde\sigma),\quad
   c_{skip} = \frac{\sigma_d^2}{\tilde\sigma^2 + \sigma_d^2},\
   c_{out} = \frac{\tilde\sigma \sigma_d}{\sqrt{\tilde\sigma^2 + \sigma_d^2}},\
   c_{in} = \frac{1}{\sqrt{\tilde\sigma^2 + \sigma_d^2}}

so that VE, VP and sub-VP use the same weights.  Source: Karras et al., Elucidating the Design
Space of Diffusion-Based Generative Models (NeurIPS 2022), table 1.

The network is fully convolutional.  Two position channels (row and column, -1 to 1 over the whole
image) let it be trained on crops (PaDIS, Hu et al., NeurIPS 2024) and the pixel size enters as a
conditioning scalar, since the same anatomy at 0.7 mm and 1.5 mm is not the same image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse.errors import GeometryError, InputError

__all__ = ["NetworkConfig", "UNet", "edm_denoise", "position_channels"]


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of a :class:`UNet`.

    Attributes:
        channels: image channels (1 real, 2 complex).
        widths: feature channels at each resolution, finest first.
        blocks: residual blocks at each resolution.
        patch: pixel-unshuffle factor at the entry (the finest level runs at 1/patch).
        embedding: width of the conditioning vector.
        sigma_data: standard deviation of training images in prior units.
        pixel_mm: pixel size at which the conditioning scalar is zero.
    """

    channels: int = 1
    widths: tuple[int, ...] = (48, 80, 112, 160)
    blocks: int = 2
    patch: int = 2
    embedding: int = 128
    sigma_data: float = 1.0
    pixel_mm: float = 1.5

    @property
    def multiple(self) -> int:
        """Image sides are padded to a multiple of this."""
        return int(self.patch * 2 ** (len(self.widths) - 1))


class _Block(nn.Module):
    """Residual block: norm, SiLU, 3x3, norm with (1 + scale) and shift, SiLU, 3x3."""

    def __init__(self, n_in: int, n_out: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_groups(n_in), n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * n_out)
        self.norm2 = nn.GroupNorm(_groups(n_out), n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.skip = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(cast(Tensor, self.conv2.bias))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``(b, n_in, h, w)``, ``(b, embedding) -> (b, n_out, h, w)``."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        return (self.skip(x) + h) * math.sqrt(0.5)


def _groups(channels: int) -> int:
    """Largest group count up to 8 that divides ``channels``."""
    return next(g for g in (8, 4, 2, 1) if channels % g == 0)


class UNet(nn.Module):
    """``F_theta``: noisy image, noise level, pixel size and position in; a residual out."""

    frequencies: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        w, e, p2 = config.widths, config.embedding, config.patch**2
        self.register_buffer("frequencies", 2.0 ** torch.arange(-2, 4).float() * math.pi)
        self.embed = nn.Sequential(nn.Linear(24, e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())
        self.entry = nn.Conv2d((config.channels + 2) * p2, w[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(w):
            self.down.append(nn.ModuleList(_Block(width, width, e) for _ in range(config.blocks)))
            self.up.append(
                nn.ModuleList(
                    _Block(2 * width if j == 0 else width, width, e) for j in range(config.blocks)
                )
            )
            if i + 1 < len(w):
                self.shrink.append(nn.Conv2d(width, w[i + 1], 2, stride=2))
                self.grow.append(nn.Conv2d(w[i + 1], 4 * width, 1))
        self.norm = nn.GroupNorm(_groups(w[0]), w[0])
        self.exit = nn.Conv2d(w[0], config.channels * p2, 3, padding=1)
        nn.init.zeros_(self.exit.weight)
        nn.init.zeros_(cast(Tensor, self.exit.bias))

    def channels_last(self) -> UNet:
        """The network with weights laid out for channels-last convolution (faster on all CPUs)."""
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def forward(self, x: Tensor, c_noise: Tensor, pixel: Tensor, position: Tensor) -> Tensor:
        """One call of the network.

        Args:
            x: ``c_in``-scaled images ``(b, channels, h, w)``, sides multiples of
                ``config.multiple``.
            c_noise: ``ln(sigma)/4``, shape ``(b,)``.
            pixel: ``ln(pixel size / config.pixel_mm)``, shape ``(b,)``.
            position: ``(b or 1, 2, h, w)`` from :func:`position_channels`.
        """
        p = self.config.patch
        phase = torch.stack([c_noise, pixel], dim=1)[:, :, None] * self.frequencies
        features = torch.cat([phase.sin(), phase.cos()], dim=2).flatten(1)
        embedding = self.embed(features.to(x.dtype))
        x = torch.cat([x, position.to(x.dtype).expand(x.shape[0], -1, -1, -1)], dim=1)
        h = self.entry(F.pixel_unshuffle(x, p))
        h = h.contiguous(memory_format=torch.channels_last)
        kept = []
        for i, blocks in enumerate(self.down):
            for block in cast(nn.ModuleList, blocks):
                h = block(h, embedding)
            kept.append(h)
            if i < len(self.shrink):
                h = self.shrink[i](h)
        for i in reversed(range(len(self.up))):
            if i < len(self.grow):
                h = F.pixel_shuffle(self.grow[i](h), 2)
            h = torch.cat([h, kept[i]], dim=1)
            for block in cast(nn.ModuleList, self.up[i]):
                h = block(h, embedding)
        return F.pixel_shuffle(self.exit(F.silu(self.norm(h))), p)


def position_channels(shape: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Row and column coordinates of pixel centres, -1 to 1 over the image, ``(1, 2, h, w)``."""
    rows, cols = (
        (torch.arange(n, dtype=torch.float32, device=device) + 0.5) * 2 / n - 1 for n in shape
    )
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"))[None]


def edm_denoise(
    net: UNet,
    x: Tensor,
    sigma: Tensor,
    pixel_mm: Tensor,
    position: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``D(x, sigma)`` of the module's text; pads to the network's multiple and crops back.

    Args:
        net: the network.
        x: images with noise of level ``sigma``, ``(b, channels, h, w)`` float32.
        sigma: noise level ``sigma / alpha`` in prior units, ``(b,)``.
        pixel_mm: pixel size in mm, ``(b,)``.
        position: ``(b or 1, 2, h, w)``.
        dtype: arithmetic of the network; everything outside is float32.

    Raises:
        GeometryError: for a wrong channel count.
        InputError: for a sigma that is not positive.

    Here: docs/theory.md, equation (21).
    """
    config = net.config
    if x.ndim != 4 or x.shape[1] != config.channels:
        raise GeometryError(
            f"the network takes images (batch, {config.channels}, rows, columns), "
            f"got {tuple(x.shape)}; a complex image needs a prior with two channels"
        )
    if not bool((sigma > 0).all()):
        raise InputError(f"the noise level of a denoiser must be positive, got {sigma.tolist()}")
    s = sigma.to(torch.float32)[:, None, None, None]
    total = torch.sqrt(s**2 + config.sigma_data**2)
    h, w = x.shape[-2:]
    pad = (0, -w % config.multiple, 0, -h % config.multiple)
    inner = F.pad(x / total, pad, mode="replicate") if any(pad) else x / total
    where = F.pad(position, pad, mode="replicate") if any(pad) else position
    c_noise = torch.log(sigma.to(torch.float32)) / 4
    pixel = torch.log(pixel_mm.to(torch.float32) / config.pixel_mm)
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
        residual = net(inner, c_noise, pixel, where)[..., :h, :w].to(torch.float32)
    return (config.sigma_data / total) ** 2 * x + s * config.sigma_data / total * residual
