"""Image quality against a known truth; data range and mask are required, never guessed.

All take images ``(slices, h, w)`` (or any batch of 2-D images), work slice by slice inside
``mask`` and return one value a slice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, stats
from skimage.metrics import structural_similarity

from inverse.errors import GeometryError, InputError

__all__ = ["body_mask", "ci95", "nrmse", "psnr", "ssim"]


def _check(
    x: ArrayLike, truth: ArrayLike, mask: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    a, b = np.asarray(x, np.float64), np.asarray(truth, np.float64)
    m = np.broadcast_to(np.asarray(mask, bool), a.shape) if a.shape == b.shape else None
    if m is None or a.ndim != 3:
        raise GeometryError(
            f"metrics compare two stacks (slices, rows, columns), got {a.shape} and {b.shape}"
        )
    if not m.any(axis=(1, 2)).all():
        raise InputError("the metric's mask is empty in at least one slice; give a larger mask")
    return a, b, m


def psnr(
    x: ArrayLike, truth: ArrayLike, *, data_range: float, mask: ArrayLike
) -> NDArray[np.float64]:
    r"""Peak signal-to-noise ratio in dB, :math:`20\log_{10}(R/\mathrm{RMSE})` inside the mask.

    Args:
        x: images ``(slices, h, w)``.
        truth: reference images.
        data_range: ``R``, in the unit of the images.
        mask: boolean, broadcastable to the images.
    """
    a, b, m = _check(x, truth, mask)
    mse = np.array([np.mean((u - v)[k] ** 2) for u, v, k in zip(a, b, m, strict=True)])
    return np.asarray(20 * np.log10(data_range) - 10 * np.log10(np.maximum(mse, 1e-300)))


def nrmse(
    x: ArrayLike, truth: ArrayLike, *, data_range: float, mask: ArrayLike
) -> NDArray[np.float64]:
    """Root-mean-square error inside the mask divided by ``data_range``."""
    return np.asarray(10 ** (-psnr(x, truth, data_range=data_range, mask=mask) / 20))


def ssim(
    x: ArrayLike, truth: ArrayLike, *, data_range: float, mask: ArrayLike
) -> NDArray[np.float64]:
    """Structural similarity with Gaussian weights (sigma 1.5), mean of its map in the mask.

    Source: Wang et al., IEEE TIP 13 (2004), with that paper's settings.
    """
    a, b, m = _check(x, truth, mask)
    values = []
    for u, v, k in zip(a, b, m, strict=True):
        _, image = structural_similarity(
            u,
            v,
            data_range=data_range,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        values.append(float(image[k].mean()))
    return np.array(values)


def ci95(values: ArrayLike) -> tuple[float, float] | None:
    r"""Student's 95 % interval of the mean over these slices.

    .. math:: \bar x \pm t_{0.975,\,n-1}\, s / \sqrt n

    It supposes independent values.  Slices of one patient are not: of them it tells how far the
    slices vary, not what to expect of another patient.

    Args:
        values: one value a slice, ``(n,)``.

    Returns:
        Its ends; ``None`` of fewer than two values, which have no interval.

    Source: Student, Biometrika 6 (1908).
    """
    v = np.asarray(values, np.float64)
    if v.size < 2:
        return None
    half = float(stats.t.ppf(0.975, v.size - 1) * v.std(ddof=1) / np.sqrt(v.size))
    return float(v.mean()) - half, float(v.mean()) + half


def body_mask(images: ArrayLike, threshold: float) -> NDArray[np.bool_]:
    """The body in each image: the largest piece above ``threshold`` without its holes.

    Holes are filled first, so that the lungs belong to it; then opening by a disc of 3 pixels
    cuts what merely touches the body, such as a table or a sheet.  Each slice stands alone, so the
    mask does not depend on which slices are chosen.

    Args:
        images: truth ``(slices, h, w)``.
        threshold: between air and tissue, in the unit of the images; -500 HU for CT.

    Returns:
        Masks ``(slices, h, w)``; empty where nothing exceeds the threshold.
    """
    a = np.asarray(images)
    if a.ndim != 3:
        raise GeometryError(f"a body mask needs a stack (slices, rows, columns), got {a.shape}")
    reach = np.arange(-3, 4)
    disc = reach[:, None] ** 2 + reach**2 <= 9
    masks = np.zeros(a.shape, bool)
    for image, mask in zip(a, masks, strict=True):
        # continued over the border, so that opening does not eat a body that the border cuts
        filled = np.pad(ndimage.binary_fill_holes(image > threshold), 3, mode="edge")
        pieces, count = ndimage.label(ndimage.binary_opening(filled, disc)[3:-3, 3:-3])
        if count:
            mask[:] = pieces == 1 + int(np.bincount(pieces.ravel())[1:].argmax())
    return masks
