"""The loss as a module: it holds options and a step counter, :mod:`mmi_loss.functional` does the work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmi_loss import functional
from mmi_loss.functional import (
    DEFAULT_BETA,
    DEFAULT_NUM_SLICES,
    DEFAULT_ORDER,
    DEFAULT_SLICE_DIM,
    DEFAULT_SNR,
    MMIComponents,
    Options,
)


class MMILoss(nn.Module):
    r"""Negative mutual information between the embeddings of two views, in nats.

    Takes the place of ``BarlowTwinsLoss()`` or ``VICRegLoss()``: two (N, D) projections in, a scalar out.

    With C the covariance of one view's features, pooled over both and standardised, and W that of what differs
    between the views of an image, the default is

    .. math:: L = -\tfrac12 \log\det(C + r) + \tfrac12 \log\det(W + r), \qquad r = k / \min(\text{snr}, N)

    on a fresh random slice of k = ``slice_dim`` features each step. It is the mutual information between a view and the
    content both views share, seen through noise of variance r (our addition to the paper; see ``objective``).

    Args:
        objective: ``"content"``: I(Z; content), for two views of one image by one network: the default.
            ``"exchangeable"``: I(Z; Z') of such views. ``"joint"``: I(Z; Z') of any two views, also of two networks
            or modalities (Chang et al. 2024, Theorem 1).
        slice_dim: Features in the determinant: a fresh random slice of so many each step where D is larger. None
            takes all D.
        num_slices: Slices per step, averaged.
        seed: With the step counter, determines the slices.
        snr: Noise floor: total feature variance over the noise variance in one direction, so about how many
            directions the loss can tell apart, at most one per sample: ``ridge = dim / min(snr, N)`` for ``dim``
            features in the determinant.
        ridge: The noise variance itself in units of feature variance, in place of the default ``snr``. It is raised
            to what the dtype resolves, ``8 * dim * eps``.
        logdet: ``"cholesky"`` is exact; ``"taylor"`` the paper's truncated series.
        order: Order of the series, for ``logdet="taylor"``.
        beta: Rescaling of the series: its spectrum is brought into (0, beta], 0 < beta < 2 (our reading).
        gather_distributed: Statistics over the batches of all ranks. The loss is that of the concatenated batch on
            every rank, and so is the gradient after DDP's averaging, also with unequal batches. A rank may hold one
            sample or none; fewer than two on all together are an error, or on slices, where that would make the device
            wait, a NaN loss. Without a process group, as with one rank, it changes nothing.
        impl: ``"auto"``; ``"eager"``: torch operations with closed-form gradients; ``"triton"``: fused CUDA kernels for
            two views in float32 or less; ``"reference"``: slow and plain, for checking. A named one is never replaced
            by another; ``"auto"`` takes the kernels for the default objective and slices on CUDA, else eager.
        slice_kind: ``"kronecker"``: 4 random mixtures of blocks of ``slice_dim / 4`` features; ``"gaussian"``: dense
            random projections, whose mean is the k-sliced mutual information (Goldfeld et al. 2022);
            ``"coordinates"``: random subsets of the features.

    Shape:
        - z_a, z_b: (N, D), N >= 2, float16, bfloat16, float32 or float64.
        - Output: a scalar, float32 (float64 for float64 input), whatever the autocast state.

    Raises:
        TypeError, ValueError: An option or input does not fit; the message names it, its value and the remedy.

    A non-finite input gives a NaN loss and NaN gradients; a constant embedding a finite loss. The step counter
    advances in training mode and is saved in the ``state_dict``; loading one without it is not an error.

    References:
        - Chang, Liu, Guo, Wen: Explicit Mutual Information Maximization for Self-Supervised Learning, 2024,
          https://arxiv.org/abs/2409.04747
        - Yu et al.: Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate
          Reduction, 2020, https://arxiv.org/abs/2006.08558 (the content objective is its form with every image a
          class of its own)

    Example:
        >>> loss_fn = MMILoss()
        >>> z_a = torch.randn(256, 2048, generator=torch.Generator().manual_seed(0), requires_grad=True)
        >>> loss_fn(z_a, z_a.detach() + 0.1).backward()
    """

    step: Tensor

    def __init__(
        self,
        objective: str = "content",
        slice_dim: int | None = DEFAULT_SLICE_DIM,
        num_slices: int = DEFAULT_NUM_SLICES,
        seed: int = 0,
        snr: float | None = DEFAULT_SNR,
        ridge: float | None = None,
        logdet: str = "cholesky",
        order: int = DEFAULT_ORDER,
        beta: float = DEFAULT_BETA,
        gather_distributed: bool = False,
        impl: str = "auto",
        slice_kind: str = "kronecker",
    ) -> None:
        super().__init__()
        self.options = Options(
            objective,
            slice_dim,
            num_slices,
            seed,
            snr,
            ridge,
            logdet,
            order,
            beta,
            gather_distributed,
            impl,
            slice_kind,
        )
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @classmethod
    def paper(cls, **options: Any) -> MMILoss:
        """The paper's loss as we read it: its general expression on all features, with the fourth-order series.

        Behind a projector wider than an eighth of the batch it fails quietly (the README shows it); keyword
        arguments change single options.
        """
        return cls(**{"objective": "joint", "slice_dim": None, "logdet": "taylor", "order": 4, **options})

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of (N, D) and (N, D) embeddings: a scalar, minus the mutual information in nats."""
        loss = functional.loss([z_a, z_b], self._step_on(z_a), self.options)
        self._advance()
        return loss

    def forward_components(self, z_a: Tensor, z_b: Tensor) -> MMIComponents:
        """The loss with the entropies it is made of, for logging; see :class:`MMIComponents`."""
        components = functional.components([z_a, z_b], self._step_on(z_a), self.options)
        self._advance()
        return components

    def extra_repr(self) -> str:
        """The options."""
        shown = vars(self.options)
        if self.options.logdet != "taylor":
            shown = {name: value for name, value in shown.items() if name not in ("order", "beta")}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def _step_on(self, z: Tensor) -> Tensor:
        """The step counter on the embeddings' device: criteria are rarely moved there."""
        self._leave_inference_mode()
        if isinstance(z, Tensor) and self.step.device != z.device:
            self.step = self.step.to(z.device)
        return self.step

    def _advance(self) -> None:
        """Count a step of training. The counter is a tensor so that compiled and captured graphs advance it too."""
        if self.training:
            self.step.add_(1)

    def _leave_inference_mode(self) -> None:
        """A counter made or moved in inference mode cannot change outside it; a copy made outside can."""
        if torch.compiler.is_compiling():  # which cannot ask
            return
        if self.step.is_inference() and not torch.is_inference_mode_enabled():
            self.step = self.step.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._leave_inference_mode()
        # A checkpoint of a criterion without state: keep counting from here.
        state_dict.setdefault(prefix + "step", self.step)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
