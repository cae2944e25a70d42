"""The loss as a module: it holds options and a step counter, :mod:`mmi_loss.functional` does the work."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from mmi_loss import functional
from mmi_loss.checks import views_of_call
from mmi_loss.functional import MMIComponents
from mmi_loss.options import Options, OptionTypes, shows_options

if TYPE_CHECKING:
    from typing_extensions import Unpack


Result = TypeVar("Result")
_HAS_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)  # since torch 2.5


def _edges(views: Sequence[Tensor]) -> Tensor:
    """First row and column of every view: they tell calls apart, and all of it need not be read."""
    return torch.cat([edge.detach().flatten() for z in views for edge in (z[:1], z[:, :1])])


class MMILoss(nn.Module):
    r"""Negative mutual information between the embeddings of two or more views, in nats.

    Takes the place of ``BarlowTwinsLoss()`` or ``VICRegLoss()``: two (N, D) projections in, a scalar out. With C the
    covariance of one view's features, pooled over both and standardised, and W that of what differs between the views
    of an image, the default is

    .. math:: L = -\tfrac12 \log\det(C + r) + \tfrac12 \log\det(W + r), \qquad r = \operatorname{tr}(W) / \min(64, N)

    on a fresh random slice of k = ``slice_dim`` features each step. It is the mutual information between a view and the
    content both views share, seen through noise of variance r (our addition to the paper), and L half the logarithm of
    a Wilks' lambda of mean squares with that noise, images as groups. The noise is what differs between the views of
    the batch, spread over 64 directions, at least k / 4N; the gradient takes it for a constant. L is about 0 without
    information and cannot go below -32 k / tr(W) or -2N. docs/migrating.md says which learning rate to use,
    docs/when-not.md when to take another loss.

    Args:
        objective: ``"content"``: I(Z; content), for views of one image by one network. ``"exchangeable"``: I(Z; Z') of
            two such views. ``"joint"``: I(Z; Z') of any two, also of two networks or modalities, which may differ in
            width.
        slice_dim: Features in the determinant: a fresh random slice of so many each step where D is larger. None
            takes all D.
        num_slices: Slices per step, averaged.
        seed: With the step counter, determines the slices.
        snr: Fixes the noise at a share of all variance, not of what differs between views: total feature variance over
            the noise variance in one direction, so about how many directions the loss can tell apart, at most one per
            sample (:func:`mmi_loss.ops.covariance.noise_floor`).
        ridge: Fixes the noise variance itself, in units of feature variance; at least what the dtype resolves, ``8 dim
            eps``.
        logdet: ``"cholesky"`` is exact; ``"taylor"`` the paper's truncated series.
        order: Order of the series, for ``logdet="taylor"``.
        beta: Rescaling of the series: its spectrum is brought into (0, beta], 0 < beta < 2 (our reading).
        gather_distributed: Statistics over the batches of all ranks. The loss is that of the concatenated batch on
            every rank, and so is the gradient after DDP's averaging, also with unequal batches. Fewer than two samples
            on all ranks together, or ranks whose step, seed or options differ, are an error, or a NaN loss where an
            error would make the device wait.
        process_group: The ranks whose batches belong together, if not all; implies ``gather_distributed``.
        impl: ``"auto"``; ``"eager"``: torch operations with closed-form gradients; ``"triton"``: fused CUDA kernels of
            the default objective; ``"reference"``: slow and plain, for checking, second derivatives and ``torch.func``.
            A named one is never replaced by another, but that under ``torch.func``'s transforms and on export eager is
            the plain form.
        slice_kind: ``"kronecker"``: 4 random mixtures of blocks of ``slice_dim / 4`` features; ``"gaussian"``: dense
            random projections (Goldfeld et al. 2022); ``"coordinates"``: random subsets of the features.

    Shape:
        - z_a, z_b: (N, D), N >= 2, float16, bfloat16, float32 or float64; or the other forms of :meth:`forward`.
        - Output: a scalar, float32 (float64 for float64 input), whatever the autocast state.

    Raises:
        TypeError, ValueError: An option or input does not fit; the message names it, its value and the remedy.

    A non-finite input gives a NaN loss and NaN gradients; a constant embedding a finite loss. The step counter advances
    in training mode and is saved in the metadata of the ``state_dict``: formats that keep tensors only (safetensors,
    ``torch.distributed.checkpoint``) lose it, and the slices start again. Averaging of weights with
    ``use_buffers=True`` freezes it: average the model without the criterion.

    Source: Chang, Liu, Guo, Wen: Explicit Mutual Information Maximization for Self-Supervised Learning, 2024,
    https://arxiv.org/abs/2409.04747

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
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)

    @classmethod
    def paper(cls, **options: Unpack[OptionTypes]) -> MMILoss:
        """The paper's loss as we read it: its general expression on all features, with the fourth-order series. Behind
        a projector wider than an eighth of the batch it may fail quietly: the loss falls, the representation does not
        get better (docs/concepts.md).
        """
        paper: OptionTypes = {"objective": "joint", "slice_dim": None, "logdet": "taylor", "order": 4}
        paper.update(options)
        return cls(**paper)

    def forward(
        self, z_a: Tensor | Sequence[Tensor] | None = None, z_b: Tensor | None = None,
        *, local_proj: Tensor | None = None, global_proj: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss of two views ``(z_a, z_b)``, (N, D) each; of a list of V views or a stacked (V, N, D) tensor as
        ``z_a`` alone; or of multi-crop's ``local_proj=`` and ``global_proj=``, (V, N, D) each, all of whose views count
        alike.
        """
        return self._of_step(functional.loss, z_a, z_b, local_proj, global_proj)

    def forward_components(
        self, z_a: Tensor | Sequence[Tensor] | None = None, z_b: Tensor | None = None,
        *, local_proj: Tensor | None = None, global_proj: Tensor | None = None,
    ) -> MMIComponents:  # fmt: skip
        """In place of :meth:`forward`, for logging: the loss with the entropies it is made of, of the same slice."""
        return self._of_step(functional.components, z_a, z_b, local_proj, global_proj)

    def frozen_at(
        self, z_a: Tensor | Sequence[Tensor] | None = None, z_b: Tensor | None = None,
        *, local_proj: Tensor | None = None, global_proj: Tensor | None = None,
    ) -> MMILoss:  # fmt: skip
        """A loss with the noise fixed at that of these views in the next call: the function whose gradient at them this
        loss has. A ValueError if there is one for each of several slices.
        """
        if self.options.snr is not None or self.options.ridge is not None or not self.options.row.is_pooled:
            return copy.deepcopy(self)
        if self.options.num_slices > 1:
            raise ValueError(f"num_slices={self.options.num_slices} have a noise each: frozen_at takes one slice")
        with torch.no_grad():
            noise = functional.noise(views_of_call(z_a, z_b, local_proj, global_proj), self.step, self.options)
        options = self.options.given()
        options["ridge"] = float(noise)
        frozen = MMILoss(**options).train(self.training)
        frozen.step = self.step.clone()
        return frozen

    def extra_repr(self) -> str:
        """The options."""
        return repr(self.options)

    def _of_step(
        self, function: Callable[..., Result], z_a: Any, z_b: Any, local_proj: Any, global_proj: Any
    ) -> Result:
        """The function of the views of a call, at the step that the call has; it counts the call."""
        is_pair = isinstance(z_a, Tensor) and isinstance(z_b, Tensor) and local_proj is None and global_proj is None
        views: Sequence[Tensor] = (z_a, z_b) if is_pair else views_of_call(z_a, z_b, local_proj, global_proj)
        if torch.compiler.is_compiling():  # which can ask none of what follows
            result = function(views, self.step, self.options)
            self.step.add_(int(self.training))
            return result
        if self.step.is_inference() and not torch.is_inference_mode_enabled():
            self.step = self.step.clone()  # made or moved in inference mode it could not change outside it
        if views and isinstance(views[0], Tensor) and self.step.device != views[0].device:
            self.step = self.step.to(views[0].device)  # criteria are rarely moved
        is_in_backward = torch._C._current_graph_task_id() != -1
        step, is_transformed = self.step, torch._C._are_functorch_transforms_active()
        if is_in_backward and self._without_gradient:
            views, step = self._recalled(views)
        hooks: AbstractContextManager[None] = nullcontext()
        if _HAS_HOOKS(True) and torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
            # Activation checkpointing keeps nothing of a region, and runs it again for what its backward needs, when
            # the counter has gone on. Its hooks do not see what is saved under these, which is small.
            hooks = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach)
        with hooks:
            result = function(views, step, self.options)
        if is_in_backward:
            return result
        if not (torch.is_grad_enabled() or torch.is_inference_mode_enabled() or is_transformed):
            self._without_gradient = [*self._without_gradient[-15:], (step.clone(), _edges(views))]
        if self.training:
            with torch._C._DisableFuncTorch():  # its transforms forbid what they would not differentiate
                self.step.add_(1)
        return result

    _without_gradient: Sequence[tuple[Tensor, Tensor]] = ()
    """Step and edges of the views of the last calls under ``no_grad``."""

    def _recalled(self, views: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        """The views with the step of the earlier call that had them. Reentrant activation checkpointing runs a forward
        without gradient, and again from within the backward. NaN in place of the views if no such call is known.
        """
        records, edges = self._without_gradient, _edges(views)
        for i in reversed(range(len(records))):
            if torch.equal(records[i][1], edges):  # it goes to the front: before it was one with equal views, if any
                self._without_gradient = [records[i], *records[:i], *records[i + 1 :]]
                return views, records[i][0]
        return [z * math.nan for z in views], self.step

    def _apply(self, fn: Any, recurse: bool = True) -> MMILoss:
        """``to_empty`` leaves tensors uninitialised: the counter keeps its value, or starts at 0 after meta."""
        before = self.step
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.step is not before and not self.step.is_meta:
            self.step = torch.zeros_like(self.step) if before.is_meta else before.to(self.step.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata") and not self.step.is_meta:
            destination._metadata[prefix[:-1]]["step"] = int(self.step)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        step = state_dict.pop(prefix + "step", local_metadata.get("step"))  # a tensor of its own, in older checkpoints
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self.step = self.step if step is None else torch.full_like(self.step, int(step))
