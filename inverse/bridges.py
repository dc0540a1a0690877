r"""Other toolkits' operators and networks in this one, and this one's priors in others.

Three ways across, each a thin wrapper:

- :class:`DeepinvOperator`: a ``deepinv.physics.LinearPhysics`` as a linear operator;
- :class:`DeepinvDenoiser`: a prior as a deepinv denoiser ``(x, sigma) -> x0``;
- :class:`NetworkDenoiser`: any network that predicts noise, velocity or the clean image at the
  steps of a discrete schedule, such as a U-Net of MONAI or diffusers, as a prior.

None of those packages is imported here: what is wrapped brings itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from inverse.errors import InputError, UnsupportedError
from inverse.operators.linop import LinearOperator
from inverse.priors.denoiser import Denoiser, expand
from inverse.sde import SDE, as_time

__all__ = ["DeepinvDenoiser", "DeepinvOperator", "DiscreteVP", "NetworkDenoiser", "Prediction"]

Prediction = Literal["epsilon", "v_prediction", "sample"]


class DeepinvOperator(LinearOperator):
    """A linear physics of deepinv: ``A`` forward, ``A_adjoint`` or the gradient of ``A`` back.

    The physics' own noise model is not applied; state the noise in the measurement.

    Args:
        physics: object with ``A`` and ``A_adjoint`` on batches ``(b, *in_shape)``.
        in_shape: shape of one image as the physics takes it, with its channels, such as
            ``(1, 256, 256)``; ``(256, 256)`` for one channel that is added.
        dtype: of images.
        adjoint: ``"given"`` uses ``A_adjoint``, which is tested; ``"autograd"`` the gradient of
            ``A``, for physics whose ``A_adjoint`` is only near.

    Raises:
        InputError: ``A_adjoint`` is not the adjoint to 0.1 %.
        UnsupportedError: an object without those methods.

    Source: Tachella et al., deepinv (2023-2026), the class ``LinearPhysics``.
    """

    def __init__(
        self,
        physics: Any,
        in_shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        *,
        adjoint: Literal["given", "autograd"] = "given",
    ) -> None:
        if not (callable(getattr(physics, "A", None)) and hasattr(physics, "A_adjoint")):
            raise UnsupportedError(
                f"a deepinv LinearPhysics with A and A_adjoint is needed, got "
                f"{type(physics).__name__}; nonlinear physics have no adjoint"
            )
        shape = tuple(int(n) for n in in_shape)
        self_shape = (1, *shape) if len(shape) == 2 else shape
        with torch.no_grad():
            data = physics.A(torch.zeros(1, *self_shape, dtype=dtype))
        if not isinstance(data, Tensor):
            raise UnsupportedError(
                f"the physics gives a {type(data).__name__}, a tensor is needed; wrap the parts "
                "of a stacked physics one by one"
            )
        super().__init__(shape, data.shape[1:], dtype, data.dtype)
        self.physics = physics
        self._image = self_shape
        self._by_autograd = adjoint == "autograd"
        error = self.adjoint_error()
        if error > 1e-3:
            raise InputError(
                f"A_adjoint of {type(physics).__name__} is off the adjoint of A by {error:.2g}; "
                "pass adjoint='autograd'"
            )

    def _forward(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - len(self.in_shape)]
        y = self.physics.A(x.reshape(-1, *self._image))
        return y.reshape(*batch, *self.out_shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        batch = y.shape[: y.ndim - len(self.out_shape)]
        flat = y.reshape(-1, *self.out_shape)
        x = self._gradient(flat) if self._by_autograd else self.physics.A_adjoint(flat)
        return x.reshape(*batch, *self.in_shape)

    def _gradient(self, y: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(
                len(y), *self._image, dtype=self.dtype, device=y.device, requires_grad=True
            )
            (back,) = torch.autograd.grad(self.physics.A(x), x, y.clone())
        return back


class DeepinvDenoiser(nn.Module):
    r"""A prior as a denoiser of deepinv, :math:`D(x, \sigma)` of images :math:`x_0 + \sigma z`.

    An image in deepinv is ``low + (high - low) v`` for ``v`` in [0, 1], in the prior's units.

    Args:
        prior: any denoiser; its noise levels bound sigma.
        low: prior value of 0 in deepinv; default 0 with ``high`` 1 keeps prior units.
        high: prior value of 1 in deepinv.
        channels: whether the prior's images have a channel axis; without one, that of deepinv
            must be 1.

    Raises:
        InputError: an empty range.
    """

    def __init__(
        self, prior: Denoiser, low: float = 0.0, high: float = 1.0, *, channels: bool = False
    ) -> None:
        super().__init__()
        if not high > low:
            raise InputError(f"the range of images must not be empty, got {low} to {high}")
        self.prior, self.low, self.scale, self.channels = prior, low, high - low, channels

    def forward(self, x: Tensor, sigma: float | Tensor, **_: Any) -> Tensor:
        """Denoise ``(b, c, h, w)`` at a level, or one level an image.

        Levels outside the prior's are moved to its nearest.

        Raises:
            InputError: several channels for a prior without them.
        """
        if not self.channels and x.shape[1] != 1:
            raise InputError(
                f"the prior has no channels, but the images have {x.shape[1]}; pass "
                "channels=True for one that has"
            )
        sde = self.prior.sde
        levels = as_time(sigma).reshape(-1).to("cpu").expand(len(x)) * self.scale
        lowest, highest = (float(sde.noise_level(t)) for t in (sde.t_min, 1.0))
        t = sde.time(levels.clamp(lowest, highest))
        u = self.low + self.scale * (x if self.channels else x[:, 0])
        u0 = self.prior.denoise(expand(sde.alpha(t), u) * u, t)
        v = (u0 - self.low) / self.scale
        return v if self.channels else v[:, None]


class DiscreteVP(SDE):
    r"""The continuous process through a discrete schedule.

    Step i of :math:`\bar\alpha_0 > \bar\alpha_1 > \dots` is at time :math:`t = (i + 1)/N`, and
    t = 0 is clean; :math:`\log\bar\alpha` is linear in between,
    :math:`\alpha = \sqrt{\bar\alpha}`, :math:`\sigma^2 = 1 - \bar\alpha`.

    Args:
        alphas_cumprod: (N,) decreasing values within (0, 1), as schedulers of diffusers and
            MONAI hold them.

    Raises:
        InputError: values that do not decrease, or leave (0, 1).

    Source: Ho et al. (NeurIPS 2020), equation (4).
    """

    def __init__(self, alphas_cumprod: Tensor | Sequence[float]) -> None:
        bar = torch.as_tensor(alphas_cumprod, dtype=torch.float64).reshape(-1).cpu()
        inside = len(bar) > 1 and bool((bar > 0).all()) and bool((bar < 1).all())
        if not inside or not bool((bar.diff() < 0).all()):
            raise InputError(
                "a schedule's alphas_cumprod must decrease within (0, 1); where the last is 0, "
                "leave it out"
            )
        self._log = torch.cat([torch.zeros(1, dtype=torch.float64), bar.log()])
        self.steps = len(bar)
        self.t_min = 1.0 / self.steps

    def _log_bar(self, t: float | Tensor) -> Tensor:
        u = as_time(t) * self.steps
        i = u.detach().floor().clamp(0, self.steps - 1).long()
        low, high = self._log.to(u.device)[i], self._log.to(u.device)[i + 1]
        return low + (high - low) * (u - i)

    def alpha(self, t: float | Tensor) -> Tensor:
        """Square root of alpha-bar."""
        return torch.exp(self._log_bar(t) / 2)

    def sigma(self, t: float | Tensor) -> Tensor:
        """Square root of 1 - alpha-bar."""
        return torch.sqrt(-torch.expm1(self._log_bar(t)))

    def step(self, t: float | Tensor) -> Tensor:
        """The step of a time, counted from 0, not rounded."""
        return (as_time(t) * self.steps - 1).clamp_min(0.0)

    def __repr__(self) -> str:
        return f"DiscreteVP({self.steps} steps)"


class NetworkDenoiser(Denoiser):
    r"""A prior from a network trained elsewhere on a discrete schedule.

    =================  ==========================================================================
    ``epsilon``        :math:`\hat x_0 = (x_t - \sigma\,\epsilon)/\alpha`
    ``v_prediction``   :math:`\hat x_0 = \alpha\,x_t - \sigma\,v`
    ``sample``         the network's output itself
    =================  ==========================================================================

    Args:
        network: ``(x, step) -> output`` or an object with ``.sample`` as diffusers' models return
            it; ``x`` is ``(b, c, h, w)`` and ``step`` ``(b,)``. A MONAI model takes them by
            ``lambda x, t: model(x, timesteps=t)``.
        alphas_cumprod: the schedule that it was trained on, (N,).
        prediction: what it predicts, in the words of diffusers.
        channels: whether images here have the channel axis; otherwise it is added, with one
            channel.
        whole_steps: round steps to whole numbers, for networks that look them up in a table.
        offset: physical value of network value 0.
        scale: physical units per network unit.
        unit: unit of those.

    Raises:
        InputError: an impossible schedule.
        UnsupportedError: another prediction.

    Source: Ho et al. (NeurIPS 2020); Salimans and Ho (ICLR 2022), appendix D, for v.
    """

    sde: DiscreteVP

    def __init__(
        self,
        network: Callable[[Tensor, Tensor], Any],
        alphas_cumprod: Tensor | Sequence[float],
        prediction: Prediction = "epsilon",
        *,
        channels: bool = False,
        whole_steps: bool = False,
        offset: float = 0.0,
        scale: float = 1.0,
        unit: Literal["physical", "HU", "relative"] = "physical",
    ) -> None:
        super().__init__(DiscreteVP(alphas_cumprod))
        if prediction not in get_args(Prediction):
            raise UnsupportedError(
                f"prediction {prediction!r} is not served; expected one of "
                f"{', '.join(get_args(Prediction))}"
            )
        if not (math.isfinite(scale) and scale > 0 and math.isfinite(offset)):
            raise InputError(f"offset and scale must be finite and scale positive, got {scale}")
        self.network = network
        self.prediction, self.channels, self.whole_steps = prediction, channels, whole_steps
        self.offset, self.scale, self.unit = offset, scale, unit

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """``E[x_0 | x_t]``, of the shape of ``x_t``."""
        step = self.sde.step(t)
        if self.whole_steps:
            step = step.round()
            t = (step + 1) / self.sde.steps
        steps = step.to(x_t.device, torch.long if self.whole_steps else x_t.dtype)
        images = x_t if self.channels else x_t[:, None]
        out = self.network(images, steps.expand(len(x_t)))
        out = out if isinstance(out, Tensor) else out.sample
        out = out if self.channels else out[:, 0]
        alpha, sigma = (expand(c, x_t) for c in self.sde.marginal(t))
        if self.prediction == "epsilon":
            return (x_t - sigma * out) / alpha
        if self.prediction == "v_prediction":
            return alpha * x_t - sigma * out
        return out
