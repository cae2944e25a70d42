"""Estimators that were considered and not shipped: the loss with one thing exchanged, for ablations alone.

Plain torch and autograd, on the slices of the product. Each has a limit in which it is the product's loss; the tests
compare there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmi_loss.functional import noise_floor
from mmi_loss.ops.slices import slice_views
from mmi_loss.options import DEFAULTS, Options


class Plain(nn.Module):
    """The loss of ``MMILoss(objective, slice_dim, ridge=ridge)``, from covariances; the others change one thing of it.

    Args:
        objective: ``"content"`` or ``"joint"``.
        slice_dim: Features in the determinant, k; None takes all.
        ridge: Noise floor in units of feature variance; None takes the default's.
    """

    def __init__(
        self, objective: str = "content", slice_dim: int | None = DEFAULTS["slice_dim"], ridge: float | None = None
    ) -> None:
        super().__init__()
        if objective not in ("content", "joint"):
            raise ValueError(f"objective={objective!r}: the estimators of the ablation know 'content' and 'joint'")
        self.options = Options(objective=objective, slice_dim=slice_dim, ridge=ridge)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Minus the mutual information of (N, D) and (N, D) embeddings, in nats."""
        views, k = self.batch(z_a, z_b), self.options.slice_dim or z_a.shape[1]
        slices = slice_views(views, k, 1, self.options.block_dim, self.slice_of(), self.options.seed, z_a.dtype)
        a, b = (z[0] for z in slices)
        mean_a, mean_b = a.mean(0), b.mean(0)
        if self.options.objective == "content":
            mean_a = mean_b = (mean_a + mean_b) / 2
        samples = torch.cat([a - mean_a, b - mean_b], 1)
        moments = self.tracked(self._moments(samples))
        std = moments[0].diagonal().clamp(min=1e-12).sqrt()
        correlations = moments / (std[:, None] * std)
        standardised = samples / (std if len(std) == samples.shape[1] else std.repeat(2))
        loss = self.minus_information(self.shrunk(correlations, standardised), standardised, self.ridge(a))
        self.step += self.training
        return loss

    def minus_information(self, correlations: Tensor, samples: Tensor, ridge: float) -> Tensor:
        """The loss from the correlations of the standardised pairs (N, 2 k)."""
        log_dets = self.log_dets(self._matrices(correlations, ridge), ridge)
        weighted = [w / 2 * log_det for w, log_det in zip(self.weights(), log_dets, strict=True)]
        return sum(weighted, start=samples.new_zeros(()))

    def _matrices(self, correlations: Tensor, ridge: float) -> list[Tensor]:
        """I + correlations / ridge, in the order of the objective's weights."""
        return self._blocks(correlations / ridge + torch.eye(correlations.shape[-1], dtype=correlations.dtype))

    def batch(self, z_a: Tensor, z_b: Tensor) -> list[Tensor]:
        """The samples that are used, (M, D) each."""
        return [z_a, z_b]

    def weights(self) -> Sequence[float]:
        """Of the log-determinants in twice the loss."""
        return self.options.row.weights

    def ridge(self, a: Tensor) -> float:
        """The noise floor under slices (N, k)."""
        return float(noise_floor(self.options, a.shape[1], len(a), a.dtype))

    def _moments(self, samples: Tensor) -> Tensor:
        """Of centred pairs of views (N, 2 k): total and within (2, k, k), or the joint second moments (1, 2 k, 2 k)."""
        n = len(samples)
        if self.options.objective == "joint":
            return (samples.T @ samples / n)[None]
        a, b = samples.chunk(2, 1)
        return torch.stack([a.T @ a + b.T @ b, (a - b).T @ (a - b)]) / (2 * n)

    def _blocks(self, matrices: Tensor) -> list[Tensor]:
        """The matrices in the order of the objective's weights."""
        if self.options.objective == "content":
            return list(matrices)
        (joint,) = matrices
        half = len(joint) // 2
        return [joint[:half, :half], joint[half:, half:], joint]

    def slice_of(self) -> Tensor:
        """The step whose slice is taken."""
        return self.step

    def tracked(self, moments: Tensor) -> Tensor:
        """The second moments that are used in place of the batch's."""
        return moments

    def shrunk(self, correlations: Tensor, samples: Tensor) -> Tensor:
        """The correlations that are used, given the standardised pairs (N, 2 k) they are of."""
        return correlations

    def log_dets(self, matrices: Sequence[Tensor], ridge: float) -> list[Tensor]:
        """Of I + correlations / ridge."""
        return [torch.linalg.cholesky(matrix).diagonal().log().sum() * 2 for matrix in matrices]


class Running(Plain):
    """Second moments with momentum over the steps: the past's are constants, the batch's carry the gradient.

    Moments of different slices do not add up, so the slice is the first step's for good. The start is corrected as in
    Adam. ``momentum=0`` is the loss on that fixed slice.
    """

    def __init__(self, momentum: float = 0.9, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.momentum = momentum
        self.register_buffer("average", None)
        self.register_buffer("weight", torch.zeros(()))

    def slice_of(self) -> Tensor:
        return torch.zeros_like(self.step)

    def tracked(self, moments: Tensor) -> Tensor:
        past = torch.zeros_like(moments) if self.average is None else self.average
        average = self.momentum * past + (1 - self.momentum) * moments
        weight = self.momentum * self.weight + 1 - self.momentum
        if self.training:
            self.average, self.weight = average.detach(), weight
        return average / weight


class Queue(Plain):
    """The projections of the last ``length`` batches beside the batch's own, as constants.

    ``length=0`` is the loss itself. The past goes through the slice of today, so a fresh one is drawn every step.
    """

    def __init__(self, length: int, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.length = length
        self.past: list[tuple[Tensor, Tensor]] = []

    def batch(self, z_a: Tensor, z_b: Tensor) -> list[Tensor]:
        both = [torch.cat(views) for views in zip((z_a, z_b), *self.past, strict=True)]
        if self.training:
            self.past = [(z_a.detach(), z_b.detach()), *self.past][: self.length]
        return both


class Annealed(Plain):
    """A noise floor that moves, in equal ratios over ``steps`` steps, from one ``snr`` to another."""

    def __init__(self, start: float, end: float, steps: int, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.start, self.end, self.steps = start, end, steps

    def ridge(self, a: Tensor) -> float:
        progress = min(float(self.step) / self.steps, 1.0)
        snr = self.start * (self.end / self.start) ** progress
        return float(noise_floor(Options(snr=snr), a.shape[1], len(a), a.dtype))


class Weighted(Plain):
    """The nuisance's entropy counted ``within`` times: against a bias of its log det, or for more invariance."""

    def __init__(self, within: float, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.within = within

    def weights(self) -> Sequence[float]:
        total, within = super().weights()
        return total, within * self.within


class CrossFitted(Plain):
    """The gradient of each half of the batch by the inverses of the other half's matrices, d log det A = tr A'^-1 dA.

    What a half shows by chance the other does not confirm. On a batch of two equal halves the gradient is the
    loss's; the value is the loss's always.
    """

    def minus_information(self, correlations: Tensor, samples: Tensor, ridge: float) -> Tensor:
        value = super().minus_information(correlations, samples, ridge).detach()
        halves = [self._matrices(self._moments(half), ridge) for half in (samples[::2], samples[1::2])]
        fitted = value.new_zeros(())
        for ours, others in (halves, halves[::-1]):
            for weight, matrix, other in zip(self.weights(), ours, others, strict=True):
                fitted = fitted + weight / 4 * (torch.linalg.inv(other).detach() * matrix).sum()
        return value + fitted - fitted.detach()


def ledoit_wolf(samples: Tensor) -> Tensor:
    """Ledoit and Wolf's (2004) shrinkage intensity of centred samples (n, p)."""
    n, p = samples.shape
    covariance = samples.T @ samples / n
    square = covariance.square().sum()
    deviation = square - covariance.trace().square() / p
    noise = (samples.square().sum(1).square().mean() - square) / n
    return (noise / deviation).clamp(max=1)


def oas(samples: Tensor) -> Tensor:
    """The oracle-approximating shrinkage intensity (Chen et al. 2010, as scikit-learn has it) of centred samples."""
    n, p = samples.shape
    covariance = samples.T @ samples / n
    mean_square, mean = covariance.square().mean(), covariance.trace() / p
    return ((mean_square + mean.square()) / ((n + 1) * (mean_square - mean.square() / p))).clamp(max=1)


INTENSITIES = {"ledoit_wolf": ledoit_wolf, "oas": oas}


class Shrunk(Plain):
    """The joint covariance of both views shrunk towards the identity, by an estimated or given intensity.

    The content objective's matrices are shrunk as they then are: T' = (1 - a) T + a I, W' = (1 - a) W + a I.
    ``intensity=0`` is the loss itself. The intensity carries its gradient.
    """

    def __init__(self, intensity: str | float, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.intensity = intensity

    def shrunk(self, correlations: Tensor, samples: Tensor) -> Tensor:
        estimated = INTENSITIES[self.intensity](samples) if isinstance(self.intensity, str) else self.intensity
        identity = torch.eye(correlations.shape[-1], dtype=correlations.dtype)
        return torch.lerp(correlations, identity, torch.as_tensor(estimated, dtype=correlations.dtype))


SCALES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    # The shipped one: the largest fourth-power norm for all.
    "common": lambda norms, total, ridge: norms.amax().expand_as(norms),
    # The same, without its gradient.
    "detached": lambda norms, total, ridge: norms.amax().detach().expand_as(norms),
    # Every matrix its own.
    "matrix": lambda norms, total, ridge: norms,
    # What bounds any spectrum: 1 + the total variance in units of the noise.
    "constant": lambda norms, total, ridge: torch.full_like(norms, 1 + total / ridge),
    # The series of the covariance with its noise floor, as it is, about the identity.
    "unscaled": lambda norms, total, ridge: torch.full_like(norms, 1 / ridge),
}


class Rescaled(Plain):
    """The truncated series after other rescalings than the shipped one: see :data:`SCALES`."""

    def __init__(self, scale: str, order: int = 4, beta: float = DEFAULTS["beta"], **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.scale, self.order, self.beta = SCALES[scale], order, beta

    def log_dets(self, matrices: Sequence[Tensor], ridge: float) -> list[Tensor]:
        norms = torch.stack([(matrix @ matrix).square().sum() ** 0.25 for matrix in matrices])
        scales = self.scale(norms, float(len(matrices[-1])), ridge) / self.beta
        return [_series(matrix, scale, self.order) for matrix, scale in zip(matrices, scales, strict=True)]


def _series(matrix: Tensor, scale: Tensor, order: int) -> Tensor:
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    x = matrix / scale - identity
    total, power = len(matrix) * scale.log(), identity
    for m in range(1, order + 1):
        power = power @ x
        total = total + (-1) ** (m + 1) / m * power.trace()
    return total


ESTIMATORS: dict[str, Callable[..., nn.Module]] = {
    "plain": Plain,
    "running": Running,
    "shrunk": Shrunk,
    "rescaled": Rescaled,
    "queue": Queue,
    "annealed": Annealed,
    "weighted": Weighted,
    "cross_fitted": CrossFitted,
}
