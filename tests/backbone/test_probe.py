import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from opsin.backbone.probe import (
    PcaPicture,
    knn_accuracy,
    knn_classify,
    outliers,
    paired_bootstrap,
    pca_basis,
    rank_me,
)
from opsin.errors import OpsinError


def clusters(seed, count, width=16, classes=5, spread=0.7):
    """Features around class centres, at random lengths so that normalising matters."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=g)
    x = centres[labels] + spread * torch.randn(count, width, generator=g)
    return x * (0.1 + 5 * torch.rand(count, 1, generator=g)), labels


def slow_knn(queries, gallery, labels, k, num_classes, temperature, exclude_self=False):
    """The protocol one query and one neighbour at a time, in fp64."""
    available = len(gallery) - exclude_self
    ks = sorted({min(i, available) for i in k})
    votes = {i: torch.zeros(len(queries), num_classes, dtype=torch.float64) for i in ks}
    for row, query in enumerate(queries.double()):
        cosine = [
            (float(query @ x / query.norm() / x.norm()), int(label))
            for i, (x, label) in enumerate(zip(gallery.double(), labels, strict=True))
            if not (exclude_self and i == row)
        ]
        nearest = sorted(cosine, reverse=True)[: ks[-1]]
        total = sum(math.exp(similarity / temperature) for similarity, _ in nearest)
        for number in ks:
            for similarity, label in nearest[:number]:
                votes[number][row, label] += math.exp(similarity / temperature) / total
    return votes


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    queries=st.integers(1, 9),
    gallery=st.integers(2, 40),
    k=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    temperature=st.sampled_from([0.03, 0.07, 1.0]),
    chunk=st.integers(1, 10),
)
def test_knn_equals_slow_loop(seed, queries, gallery, k, temperature, chunk):
    x, _ = clusters(seed, queries)
    y, labels = clusters(seed + 1, gallery)
    ours = knn_classify(x, y, labels, k, num_classes=7, temperature=temperature, chunk=chunk)
    slow = slow_knn(x, y, labels, k, 7, temperature)
    assert ours.keys() == slow.keys()
    for number, votes in ours.items():
        torch.testing.assert_close(votes.double(), slow[number], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("chunk", [1, 3, 30])
def test_a_query_is_not_its_own_neighbour(chunk):
    x, labels = clusters(3, 23)
    ours = knn_classify(x, x, labels, (1, 5, 99), num_classes=5, exclude_self=True, chunk=chunk)
    assert list(ours) == [1, 5, 22]
    slow = slow_knn(x, x, labels, (1, 5, 99), 5, 0.07, exclude_self=True)
    for number, votes in ours.items():
        torch.testing.assert_close(votes.double(), slow[number], atol=2e-5, rtol=2e-4)


def test_knn_agrees_with_scikit_learn():
    x, _ = clusters(0, 200, spread=1.5)
    y, labels = clusters(1, 500, spread=1.5)
    ours = knn_classify(x, y, labels, (5, 20), num_classes=5)
    for number in (5, 20):
        # Euclidean distance on the unit sphere: similarity = 1 - d²/2.
        reference = KNeighborsClassifier(
            number, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute", metric="euclidean"
        ).fit(torch.nn.functional.normalize(y).numpy(), labels.numpy())
        expected = reference.predict_proba(torch.nn.functional.normalize(x).numpy())
        shares = ours[number] / ours[number].sum(1, keepdim=True)
        np.testing.assert_allclose(shares.numpy(), expected, atol=2e-5)


def test_softmax_is_over_the_largest_k():
    x, _ = clusters(0, 10)
    y, labels = clusters(1, 300)
    votes = knn_classify(x, y, labels, (10, 200), num_classes=5)
    assert (votes[10].sum(1) < 0.999).all()
    torch.testing.assert_close(votes[200].sum(1), torch.ones(10))


def test_knn_is_fp32_inside_an_autocast_region():
    x, _ = clusters(0, 20)
    y, labels = clusters(1, 60)
    outside = knn_classify(x, y, labels, (5,), num_classes=5)[5]
    with torch.autocast("cpu", torch.bfloat16):
        inside = knn_classify(x, y, labels, (5,), num_classes=5)[5]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_knn_accuracy():
    gallery = torch.eye(3)
    queries = torch.tensor([[2.0, 0.1, 0], [0, 0.3, 0.1], [0, 0.1, 9], [0.1, 0, 1]])
    labels, truth = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 1])
    assert knn_accuracy(queries, gallery, labels, truth, (1, 10), num_classes=3) == {1: 0.75, 3: 0.75}


def test_knn_mistakes():
    x, labels = clusters(0, 4)
    with pytest.raises(OpsinError, match="at least 1 images in the gallery"):
        knn_classify(x, x[:0], labels[:0], num_classes=5)
    with pytest.raises(OpsinError, match="at least 2 images"):
        knn_classify(x[:1], x[:1], labels[:1], num_classes=5, exclude_self=True)
    with pytest.raises(OpsinError, match="k 0 is not a number of neighbours"):
        knn_classify(x, x, labels, (0, 10), num_classes=5)
    with pytest.raises(OpsinError, match="test set is empty"):
        knn_accuracy(x[:0], x, labels, labels[:0], num_classes=5)
    with pytest.raises(ValueError, match="itself"):
        knn_classify(x[:2], x, labels, num_classes=5, exclude_self=True)


def test_rank_me_of_known_spectra():
    q = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    assert rank_me(q) == pytest.approx(8, abs=1e-6)  # eight equal singular values
    spectrum = torch.tensor([4.0, 2, 1, 1], dtype=torch.float64)  # shares 1/2 1/4 1/8 1/8: entropy 1.75 bits
    assert rank_me(q[:, :4] * spectrum) == pytest.approx(2**1.75, rel=1e-6)
    assert rank_me((q[:, :4] * spectrum).T) == pytest.approx(2**1.75, rel=1e-6)
    assert rank_me(torch.ones(100, 32)) == pytest.approx(1, abs=1e-4)
    assert rank_me(torch.zeros(10, 4)) == 0
    assert math.isnan(rank_me(torch.tensor([[1.0, float("nan")], [0, 1]])))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(1, 30), d=st.integers(1, 30), scale=st.floats(1e-3, 1e3))
def test_rank_me_equals_the_definition_and_ignores_scale(seed, n, d, scale):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    singular = np.linalg.svd(x.numpy(), compute_uv=False)
    share = singular / singular.sum() + 1e-7
    assert rank_me(x * scale) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)
    assert 1 - 1e-6 <= rank_me(x) <= min(n, d) + 1e-6


def test_bootstrap_equals_resampling_pairs():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(200, generator=g) < 0.7, torch.rand(200, generator=g) < 0.55
    mean, low, high = paired_bootstrap(a, b)
    difference = a.float() - b.float()
    index = torch.randint(200, (10_000, 200), generator=g)
    resampled = torch.quantile(difference[index].mean(1), torch.tensor([0.025, 0.975]))
    assert mean == pytest.approx(difference.mean().item(), abs=1e-6)
    assert [low, high] == pytest.approx(resampled.tolist(), abs=0.011)  # outcomes are multiples of 0.005
    assert (mean, low, high) == paired_bootstrap(a, b)
    assert paired_bootstrap(b, a)[0] == pytest.approx(-mean)
    assert paired_bootstrap(a, a) == (0, 0, 0)
    assert paired_bootstrap(torch.ones(9), torch.zeros(9)) == (1, 1, 1)


def test_bootstrap_covers_the_truth():
    """A 95 % interval holds the true difference in about 95 % of experiments."""
    g = torch.Generator().manual_seed(1)
    inside = 0
    for seed in range(300):
        base = torch.rand(150, generator=g)
        _, low, high = paired_bootstrap(base < 0.6, base < 0.5, repeats=2000, seed=seed)
        inside += low <= 0.1 <= high
    assert 0.91 <= inside / 300 <= 0.985


def test_bootstrap_needs_pairs():
    with pytest.raises(OpsinError, match="not 3 and 4"):
        paired_bootstrap(torch.ones(3), torch.ones(4))


def scene(seed, h=12, w=10, width=24):
    """Patches `[h, w, D]` with an object in the middle that differs from the background in one direction."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(7)
    axis, parts = torch.randn(width, generator=shared), torch.randn(3, width, generator=shared)
    inside = torch.zeros(h, w, dtype=torch.bool)
    inside[3 : h - 3, 3 : w - 2] = True
    x = 0.1 * torch.randn(h, w, width, generator=g) + torch.where(inside[..., None], 2.0, -2.0) * axis
    x += inside[..., None] * (torch.randn(h, w, 3, generator=g) * torch.tensor([1.0, 0.6, 0.3])) @ parts
    return x, inside


def test_all_four_borders_count():
    inside = torch.zeros(30, 8, dtype=torch.bool)  # an hourglass: it fills the top and bottom rows, not the sides
    inside[[0, -1]] = True
    inside[:, 3:5] = True
    x = torch.where(inside[..., None], 1.0, -1.0) * torch.randn(6, generator=torch.Generator().manual_seed(0))
    for patches, expected in ((x, inside), (x.transpose(0, 1), inside.T)):
        assert torch.equal(pca_basis([patches]).apply(patches)[1], expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_what_keeps_off_the_border(sign):
    scenes = [scene(0), scene(1, 8, 14)]
    basis = pca_basis([sign * x for x, _ in scenes])
    for x, inside in scenes:
        rgb, foreground = basis.apply(sign * x)
        assert torch.equal(foreground, inside)
        assert rgb.shape == (*inside.shape, 3)
        assert rgb.dtype == torch.float32
        assert rgb.min() >= 0
        assert rgb.max() <= 1


def test_components_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    scenes = [scene(0), scene(1, 8, 14), scene(2)]
    basis = pca_basis([x for x, _ in scenes])
    foreground = torch.cat([x[inside] for x, inside in scenes]).double().numpy()
    reference = PCA(3, svd_solver="full").fit(foreground)
    overlap = np.abs((reference.components_ * basis.components.numpy()).sum(1))
    np.testing.assert_allclose(overlap, 1, atol=1e-9)
    np.testing.assert_allclose(basis.centre.numpy(), reference.mean_, atol=1e-12)
    for component in basis.components:
        assert component[component.abs().argmax()] > 0
    projection = (foreground - reference.mean_) @ basis.components.numpy().T
    np.testing.assert_allclose(basis.low, np.quantile(projection, 0.01, axis=0), atol=1e-9)
    np.testing.assert_allclose(basis.high, np.quantile(projection, 0.99, axis=0), atol=1e-9)
    rgb = torch.cat([basis.apply(x)[0][inside] for x, inside in scenes])
    expected = ((projection - basis.low.numpy()) / (basis.high - basis.low).numpy()).clip(0, 1)
    np.testing.assert_allclose(rgb, expected, atol=1e-6)


def test_joint_basis_is_one_for_all_images():
    a, b = scene(0)[0], scene(1)[0]
    basis = pca_basis([a, b])
    joint, _ = basis.apply(torch.cat([a, b]))
    torch.testing.assert_close(joint, torch.cat([basis.apply(a)[0], basis.apply(b)[0]]), atol=1e-6, rtol=0)


def test_threshold_moves_the_foreground():
    x, _ = scene(0)
    sizes = [int(pca_basis([x], threshold).apply(x)[1].sum()) for threshold in (-0.95, 0.0, 1.7)]
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_picture_survives_features_without_contrast():
    for x in (torch.zeros(4, 4, 8), torch.ones(4, 4, 8), torch.randn(1, 1, 8), torch.randn(2, 2, 8)):
        rgb, _ = pca_basis([x]).apply(x)
        assert rgb.isfinite().all()


def test_saved_basis_gives_the_same_picture(tmp_path):
    x, _ = scene(0)
    basis = pca_basis([x])
    basis.save(tmp_path / "pca.safetensors")
    again = PcaPicture.load(tmp_path / "pca.safetensors")
    assert torch.equal(again.apply(x)[0], basis.apply(x)[0])
    assert torch.equal(again.apply(x)[1], basis.apply(x)[1])
    assert again.threshold == basis.threshold


def test_picture_mistakes(tmp_path):
    from safetensors.torch import save_file

    x, _ = scene(0)
    with pytest.raises(OpsinError, match="width 24, not 8"):
        pca_basis([x]).apply(torch.zeros(2, 2, 8))
    with pytest.raises(OpsinError, match="at least one image"):
        pca_basis([])
    with pytest.raises(OpsinError, match="NaN or infinity"):
        pca_basis([x * float("inf")])
    with pytest.raises(OpsinError, match="cannot read the PCA basis"):
        PcaPicture.load(tmp_path / "missing")
    (tmp_path / "noise").write_bytes(b"not a tensor file")
    with pytest.raises(OpsinError, match="cannot read the PCA basis"):
        PcaPicture.load(tmp_path / "noise")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(OpsinError, match="no PCA basis"):
        PcaPicture.load(tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(OpsinError, match="cannot write the PCA basis"):
        pca_basis([x]).save(tmp_path / "file" / "pca")


# ---- patch norms


@pytest.mark.parametrize("scale", [1e-3, 1, 150])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_outliers_are_counted_against_the_median(scale, dtype):
    norms = torch.cat([torch.full((979,), 1.0), torch.full((20,), 10.0), torch.full((1,), 2.9)])
    found = outliers((scale * norms).to(dtype).view(4, 10, 25))
    assert found.median == pytest.approx(scale, rel=1e-2)
    assert found.peak == pytest.approx(10, rel=1e-2)
    assert found.share == pytest.approx(0.02)


def test_patches_that_hardly_differ_have_no_outliers():
    norms = 5 + 0.01 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    found = outliers(norms)  # some lie four standard deviations out
    assert found.share == 0
    assert 1 < found.peak < 1.1


@pytest.mark.parametrize(
    "norms", [torch.empty(0), torch.tensor([1.0, float("nan")]), torch.tensor([1.0, torch.inf]), torch.zeros(3)]
)
def test_norms_that_are_none(norms):
    with pytest.raises(OpsinError, match="patch norms must be finite and most of them above 0: check the weights"):
        outliers(norms)
