"""The objectives: one row each of a table that every route and the reference read.

A route turns the views into parts, takes second moments of some of the parts, and log det(I + moment / noise) of each.
An objective says which parts a moment takes and how the log-determinants add up to entropies; the loss follows. The
parts are of two kinds:

* *Pooled* views are more samples of the same features. Their parts are orthonormal contrasts of the views: number 0 is
  their mean (up to a factor), what they share; the others are what they differ in. A moment is the mean of the second
  moments of its contrasts, whose number are its degrees of freedom.
* Otherwise views are more features of the same samples, and may differ in width. The parts are the views themselves,
  and a moment is the joint covariance of its views.
"""

from __future__ import annotations

from dataclasses import dataclass

Weights = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One row. Half the weighted sum of the log-determinants is the Gaussian differential entropy of standardised
    features plus noise, up to the constant of their number.
    """

    is_pooled: bool = True
    is_pairwise: bool = True  # of more than two views, the mean over all pairs
    is_spurious: bool = True  # from few samples per feature it measures chance
    moments: tuple[tuple[int, int | None], ...]  # first part, last part + 1 (None: to the end)
    entropy_a: Weights
    entropy_b: Weights
    conditional_entropy: Weights
    weights: Weights = ()  # in twice the loss, -2 I = 2 H(Z_a | .) - 2 H(Z_a): they follow

    def __post_init__(self) -> None:
        pairs = zip(self.conditional_entropy, self.entropy_a, strict=True)
        object.__setattr__(self, "weights", tuple(conditional - entropy for conditional, entropy in pairs))


_content, _exchangeable, _joint = ((0, None), (1, None)), ((0, None), (0, 1), (1, None)), ((0, 1), (1, None), (0, None))
OBJECTIVES = {
    # I(Z; content) = H(Z) - H(Z | content): the total covariance, and that within images.
    "content": Objective(
        is_pairwise=False, is_spurious=False,
        moments=_content, entropy_a=(1, 0), entropy_b=(1, 0), conditional_entropy=(0, 1),
    ),
    # I(Z; Z') of identical networks: the joint covariance is that of the sum and that of the difference.
    "exchangeable": Objective(
        moments=_exchangeable, entropy_a=(1, 0, 0), entropy_b=(1, 0, 0), conditional_entropy=(-1, 1, 1)
    ),
    # I(Z; Z') of any two views: view a, view b, both (Chang et al. 2024, Theorem 1).
    "joint": Objective(
        is_pooled=False, moments=_joint, entropy_a=(1, 0, 0), entropy_b=(0, 1, 0), conditional_entropy=(0, -1, 1)
    ),
}  # fmt: skip
