"""The measures against numpy and scipy, batch by batch, and over two real gloo ranks with different data."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist

from mmi_loss import MMILoss, diagnostics
from mmi_loss.doctor.isolation import isolated
from mmi_loss.measures import OF_ONE_VIEW, OF_TWO_VIEWS, Measures
from tests import oracle


def sample(n=300, dim=24, seed=0, noise=0.5):
    """Two views of some shared content, whose spectrum falls and whose mean is not 0."""
    generator = torch.Generator().manual_seed(seed)
    x, *e = torch.randn(3, n, dim, generator=generator, dtype=torch.float64)
    scale = torch.arange(1, dim + 1) ** -0.5
    return [(x + noise * y) * scale + 0.3 for y in e]


# The definitions, by numpy and scipy


def entropy_rank(weights):
    p = weights[weights > 0] / weights.sum()
    return math.exp(-(p * np.log(p)).sum())


def rank_me(z, epsilon):
    singular = scipy.linalg.svdvals(z)
    p = singular / singular.sum() + epsilon
    return math.exp(-(p * np.log(p)).sum())


def lidar(views, delta=1e-4):
    """Eigenvalues of the generalised problem B v = l (W + delta) v."""
    x = np.stack(views, 1)
    between = np.cov(x.mean(1).T, ddof=1)
    within = sum(np.cov(image.T, ddof=1) for image in x) / len(x)
    return entropy_rank(scipy.linalg.eigh(between, within + delta * np.eye(len(within)), eigvals_only=True).clip(0))


def alpha_req(z, first=11, last=100):
    values = scipy.linalg.eigvalsh(np.cov(z.T))[::-1][first - 1 : last]
    if len(values) < 2:
        return math.nan
    ranks = np.arange(first, first + len(values))
    return -np.polyfit(np.log(ranks), np.log(values), 1, w=ranks**-0.5)[0]  # polyfit squares its weights


def expected(z_a, z_b):
    a, b = z_a.numpy(), z_b.numpy()
    values = scipy.linalg.eigvalsh(np.cov(a.T))
    return {
        "rank_me": rank_me(a, 1e-7),
        "effective_rank": entropy_rank(values),
        "participation_ratio": values.sum() ** 2 / (values**2).sum(),
        "alpha_req": alpha_req(a),
        "lidar": lidar([a, b]),
        "content_information": oracle.information([z_a, z_b]),
        "mutual_information": -0.5 * np.log(1 - oracle.canonical_correlations(z_a, z_b) ** 2).sum()
        - diagnostics.spurious_information(len(a), a.shape[1], b.shape[1]),
    }


@pytest.mark.parametrize("name", [*OF_ONE_VIEW, *OF_TWO_VIEWS])
def test_measures_are_the_oracles(name):
    z_a, z_b = sample()
    function = getattr(diagnostics, name)
    value = function(z_a) if name in OF_ONE_VIEW else function(z_a, z_b)
    assert value.item() == pytest.approx(expected(z_a, z_b)[name], rel=1e-9)


def test_measures_of_more_features_than_samples():
    z_a, z_b = sample(20, 48)
    assert diagnostics.lidar(z_a, z_b).item() == pytest.approx(lidar([z_a.numpy(), z_b.numpy()]), rel=1e-6)
    assert diagnostics.content_information(z_a, z_b).item() == pytest.approx(oracle.information([z_a, z_b]), rel=1e-9)
    assert diagnostics.alpha_req(z_a).isfinite()
    assert diagnostics.alpha_req(z_a[:, :11]).isnan()  # one eigenvalue makes no line


def test_several_views():
    views = [*sample(), sample(seed=1)[0]]
    assert diagnostics.lidar(*views).item() == pytest.approx(lidar([z.numpy() for z in views]), rel=1e-9)
    assert diagnostics.content_information(*views).item() == pytest.approx(oracle.information(views), rel=1e-9)
    loss = MMILoss(slice_dim=None)(views)
    assert diagnostics.content_information(*views).item() == pytest.approx(-loss.item(), rel=1e-9)


@pytest.mark.parametrize(
    "z",
    [
        torch.full((64, 16), 0.3),
        torch.full((64, 16), 0.3, dtype=torch.float64),
        torch.zeros(64, 16),
        torch.linspace(0.1, 0.2, 130, dtype=torch.float64).expand(500, 130),  # many enough to be accumulated
    ],
    ids=["a third", "in float64", "zeros", "accumulated"],
)
def test_constant_embeddings_hold_nothing(z):
    for value in (diagnostics.participation_ratio(z), diagnostics.lidar(z, z), diagnostics.content_information(z, z)):
        assert value.item() == 0
    assert diagnostics.rank_me(z).item() == pytest.approx(1, abs=1e-3)  # its epsilon counts once a feature
    measures = Measures()
    for part in z.split(50):
        measures.update(part, part)
    found = measures.compute()
    assert all(found[name] == 0 for name in ("effective_rank", "participation_ratio", "lidar", "content_information"))


def test_views_of_unlike_width_are_refused():
    with pytest.raises(ValueError, match=r"the views must be as wide.*\(9, 4\), \(9, 3\)"):
        diagnostics.lidar(torch.randn(9, 4), torch.randn(9, 3))


# Batch by batch


@pytest.mark.parametrize(("n", "dim", "batch"), [(300, 24, 70), (300, 24, 1), (20, 48, 7), (500, 3, 33)])
def test_batches_are_the_whole(n, dim, batch):
    z_a, z_b = sample(n, dim)
    measures, whole = Measures(information_dim=max(1, min(dim, n // 8))), Measures()
    for pair in zip(z_a.split(batch), z_b.split(batch), strict=True):
        measures.update(*pair)
    whole.update(z_a, z_b)
    found = {name: value.item() for name, value in measures.compute().items()}
    assert found == pytest.approx({k: v.item() for k, v in whole.compute().items()}, rel=1e-8, nan_ok=True)
    assert measures._rows.shape[0] <= max(batch, 2 * (1 + 2 * dim)) + batch
    if dim * 8 <= n:
        assert found == pytest.approx(expected(z_a, z_b), rel=1e-8, nan_ok=True)


def test_one_view_and_reset():
    z_a, z_b = sample()
    measures = Measures()
    with pytest.raises(ValueError, match="no samples yet"):
        measures.compute()
    measures.update(z_a)
    assert set(measures.compute()) == set(OF_ONE_VIEW)
    with pytest.raises(ValueError, match="2 views of 24 features after 1 of 24: reset"):
        measures.update(z_a, z_b)
    measures.reset()
    measures.update(z_a, z_b)
    assert set(measures.compute()) == {*OF_ONE_VIEW, *OF_TWO_VIEWS}
    with pytest.raises(ValueError, match="NaN or infinite"):
        measures.update(z_a.log(), z_b)


def test_wide_embeddings_are_sliced_for_information():
    z_a, z_b = sample(200, 96)
    measures = Measures(information_dim=8)
    measures.update(z_a, z_b)
    directions = torch.randn(96, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slices = z_a @ directions, z_b @ directions
    found = measures.compute()
    assert found["mutual_information"].item() == pytest.approx(diagnostics.mutual_information(*slices).item(), rel=1e-8)
    assert found["content_information"].item() == pytest.approx(
        diagnostics.content_information(*slices).item(), rel=1e-8
    )


# Over ranks

SIZES = {"unequal": (220, 80), "one has seen nothing": (300, 0), "fewer than features": (17, 5)}


def _measure(rank, sizes, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(sizes))
    start, measures = sum(sizes[:rank]), Measures()
    pair = [z[start : start + sizes[rank]] for z in sample(sum(sizes))]
    for z_a, z_b in zip(*(z.split(64) for z in pair), strict=True):
        if len(z_a):
            measures.update(z_a, z_b)
    return {name: value.item() for name, value in measures.compute().items()}


@pytest.mark.parametrize("name", SIZES)
def test_two_ranks_are_one_process(name, tmp_path):
    sizes = SIZES[name]
    answers = isolated(60, *((_measure, (rank, sizes, str(tmp_path))) for rank in range(len(sizes))))
    whole = Measures()
    whole.update(*sample(sum(sizes)))
    truth = {name: value.item() for name, value in whole.compute().items()}
    for answer in answers:
        assert answer == pytest.approx(truth, rel=1e-8, nan_ok=True)


def _disagree(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    measures = Measures()
    measures.update(torch.randn(9, 3 + rank))
    measures.compute()


def test_ranks_of_different_embeddings_are_an_error_on_both(tmp_path):
    for answer in isolated(60, *((_disagree, (rank, str(tmp_path))) for rank in (0, 1))):
        assert "ranks have seen embeddings of different kinds: 1 views of 3, 1 views of 4" in answer


# stable-pretraining's own, where it is installed


class _Here:
    """What its callbacks ask of a trainer and a module."""

    def __init__(self, data):
        self.data, self.global_rank, self.logged = data, 0, {}

    def log(self, name, value, **_):
        self.logged[name] = value


def test_rank_me_and_lidar_are_those_of_stable_pretraining():
    callbacks = pytest.importorskip("stable_pretraining.callbacks", reason="stable-pretraining is not installed")
    z_a, z_b = sample(400, 32)
    theirs, here = callbacks.RankMe("rank_me", "embedding", 400, 32), _Here(z_a)
    theirs._target_queue = here
    theirs.on_validation_batch_end(here, here, {}, {}, 0)
    assert diagnostics.rank_me(z_a, epsilon=1e-5).item() == pytest.approx(here.logged["rank_me"], rel=1e-6)
    theirs = callbacks.LiDAR("lidar", "embedding", 800, 32, n_classes=400, samples_per_class=2)
    embeddings = torch.stack([z_a, z_b], 1).flatten(0, 1)
    ours = diagnostics.lidar(z_a, z_b).item()
    assert ours == pytest.approx(theirs._compute_lidar(embeddings)["lidar"], rel=1e-6)
