"""The loss as a module: it holds options and a step counter, :mod:`mmi_loss.functional` does the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmi_loss import functional
from mmi_loss.checks import views_of_call
from mmi_loss.functional import MMIComponents
from mmi_loss.options import Options, OptionTypes, shows_options

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    """The calls so far, a scalar; it determines the slices. ``loss.step.fill_(n)`` sets it."""

    @shows_options
    def __init__(self, **options: Unpack[OptionTypes]) -> None:
        super().__init__()
        self.options = Options(**options)
        # Not among the tensors of the state_dict, so that a run may exchange its criterion: see _save_to_state_dict.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)

    @classmethod
    def paper(cls, **options: Unpack[OptionTypes]) -> MMILoss:
        """The paper's loss as we read it: its general expression on all features, with the fourth-order series.

        Behind a projector wider than an eighth of the batch it fails quietly (the README shows it); keyword
        arguments change single options.
        """
        given: OptionTypes = {"objective": "joint", "slice_dim": None, "logdet": "taylor", "order": 4}
        given.update(options)
        return cls(**given)

    def forward(
        self,
        z_a: Tensor | Sequence[Tensor] | None = None,
        z_b: Tensor | None = None,
        *,
        local_proj: Tensor | None = None,
        global_proj: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar: minus the mutual information in nats.

        Takes two views ``(z_a, z_b)``, (N, D) each; a list of V views or a stacked (V, N, D) tensor as ``z_a`` alone;
        or multi-crop's ``local_proj=`` and ``global_proj=``, (V, N, D) each, all of whose views count alike.
        """
        is_pair = isinstance(z_a, Tensor) and isinstance(z_b, Tensor)
        views = (z_a, z_b) if is_pair else views_of_call(z_a, z_b, local_proj, global_proj)
        step = self._step_on(views[0])
        loss = functional.loss(views, step, self.options)
        if self.training and step is self.step:
            step.add_(1)
        return loss

    def forward_components(
        self,
        z_a: Tensor | Sequence[Tensor] | None = None,
        z_b: Tensor | None = None,
        *,
        local_proj: Tensor | None = None,
        global_proj: Tensor | None = None,
    ) -> MMIComponents:
        """The loss in place of :meth:`forward`, with the entropies it is made of, of the same slice, for logging.

        The call counts as one; see :class:`MMIComponents`.
        """
        views = views_of_call(z_a, z_b, local_proj, global_proj)
        step = self._step_on(views[0])
        components = functional.components(views, step, self.options)
        if self.training and step is self.step:
            step.add_(1)
        return components

    def extra_repr(self) -> str:
        """The options."""
        return repr(self.options)

    def _step_on(self, z: Tensor) -> Tensor:
        """The step of this call, on the embeddings' device: criteria are rarely moved there.

        It is the counter itself, which then counts the call; or another tensor, if the call is one that was made
        before: activation checkpointing runs the forward again, from within the backward. The last call is the first to
        be run again, the one before it the second.
        """
        if torch.compiler.is_compiling():  # which can ask none of the following
            return self.step
        if self.step.is_inference() and not torch.is_inference_mode_enabled():
            # Made or moved in inference mode it cannot change outside it; a copy made outside can.
            self.step = self.step.clone()
        if isinstance(z, Tensor) and self.step.device != z.device:
            self.step = self.step.to(z.device)
        backward = torch._C._current_graph_task_id()
        if backward == -1 or not self.training:
            return self.step
        last, count = self._recomputed
        self._recomputed = backward, count + 1 if backward == last else 1
        return self.step - self._recomputed[1]

    _recomputed = -1, 0
    """The backward pass in which a forward was last run again, and how many were."""

    def _apply(self, fn: Any, recurse: bool = True) -> MMILoss:
        """``to_empty`` leaves tensors uninitialised: the counter keeps its value, or starts at 0 after meta."""
        before = self.step
        super()._apply(fn, recurse)
        if self.step is not before and not self.step.is_meta:
            with torch.no_grad():
                self.step.zero_() if before.is_meta else self.step.copy_(before)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The counter is saved in the metadata of the state_dict, beside the module's version.

        As a tensor of its own it would make a strict load fail wherever the other criterion has none. Formats that
        keep tensors only (safetensors, torch.distributed.checkpoint) lose it: the slices then start again.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata") and not self.step.is_meta:
            destination._metadata[prefix[:-1]]["step"] = int(self.step)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        if "step" in local_metadata:
            if self.step.is_inference():
                self.step = self.step.clone()
            self.step.fill_(local_metadata["step"])
