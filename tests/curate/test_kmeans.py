import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from opsin.curate import kmeans
from opsin.curate.kmeans import Statistics, assign, improve, lloyd, seed_centroids, statistics_of, updated
from opsin.errors import OpsinError


def points(m, d=16, centres=12, seed=0, spread=0.6):
    random = torch.Generator().manual_seed(seed)
    where = torch.randint(0, centres, (m,), generator=random)
    mixed = torch.randn(centres, d, generator=random)[where] + spread * torch.randn(m, d, generator=random)
    return torch.nn.functional.normalize(mixed, dim=1)


def cost(x, centroids):
    return float(assign(x, torch.as_tensor(centroids))[1].double().sum())


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 60), k=st.integers(1, 50), d=st.integers(1, 9), chunk=st.sampled_from([1, 200, 3000, 2**28]))
def test_assignment_is_that_of_all_distances_however_it_is_cut(m, k, d, chunk):
    random = torch.Generator().manual_seed(m * 1000 + k)
    x, c = torch.randn(m, d, generator=random), torch.randn(k, d, generator=random)
    cluster, distance = assign(x, c, chunk)
    exact = ((x.double()[:, None] - c.double()) ** 2).sum(dim=2)
    torch.testing.assert_close(distance.double(), exact.min(dim=1).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exact.gather(1, cluster[:, None])[:, 0], exact.min(dim=1).values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [64, 2**28])
def test_ties_go_to_the_lowest_centroid_and_a_centroid_is_at_distance_zero(chunk):
    x = points(40)
    cluster, distance = assign(x, torch.cat([x, x]), chunk)
    assert cluster.tolist() == list(range(40))
    assert distance.tolist() == [0.0] * 40


def test_products_are_cut_by_points_and_by_centroids(monkeypatch):
    sizes = []
    real = kmeans._scores
    monkeypatch.setattr(kmeans, "_scores", lambda x, c, h: sizes.append(len(x) * len(c)) or real(x, c, h))
    assign(points(500), points(300, seed=1), 8 * 700)
    assert max(sizes) <= 700


def test_seeds_are_points_that_differ_and_lie_in_every_concept():
    x = points(3000, spread=0.05)
    seeds = seed_centroids(x, 60, 3)
    assert len(torch.unique(seeds, dim=0)) == 60
    assert (assign(seeds, x)[1] == 0).all()
    within = cost(x, lloyd(x, 12, 50, 1).centroids)
    rare = torch.cat([x[:2], points(3000, centres=1, seed=5, spread=0.05)])  # all but two in one concept
    assert all(
        cost(rare, seed_centroids(rare, 24, seed)) < 2 * cost(rare, lloyd(rare, 3, 50, 0).centroids)
        for seed in range(5)
    )
    assert all(cost(x, seed_centroids(x, 24, seed)) < 3 * within for seed in range(5))
    assert torch.equal(seeds, seed_centroids(x, 60, 3))
    assert not torch.equal(seeds, seed_centroids(x, 60, 4))


def test_seeds_find_what_is_small_beside_what_is_far():
    random = torch.Generator().manual_seed(0)
    far = torch.randn(5000, 4, generator=random) + 1000
    near = torch.eye(4).repeat(5000, 1) * 10 + 0.1 * torch.randn(20_000, 4, generator=random)
    assert all(cost(near, seed_centroids(torch.cat([far, near]), 100, seed)) < 20_000 for seed in range(3))


def test_duplicates_are_no_seeds_twice_and_too_few_points_are_named():
    x = points(7).repeat(30, 1)
    assert len(torch.unique(seed_centroids(x, 7, 0), dim=0)) == 7
    with pytest.raises(OpsinError, match=r"210 points, of which only 7 are different, cannot make 8 clusters"):
        seed_centroids(x, 8, 0)
    with pytest.raises(OpsinError, match=r"^5 points cannot make 6 clusters"):
        seed_centroids(x[:5], 6, 0)
    assert lloyd(x, 7, 10, 0).cost < 1e-9


def test_cost_is_that_of_faiss_and_scikit_learn():
    x = points(6000, d=32, centres=40, spread=1.0)
    ours = min(cost(x, lloyd(x, 50, 25, seed).centroids) for seed in (0, 1))
    other = faiss.Kmeans(32, 50, niter=25, nredo=2, max_points_per_centroid=10**9, seed=1)
    other.train(x.numpy())
    sklearn = KMeans(50, n_init=2, max_iter=25, random_state=0).fit(x.numpy())
    assert ours == pytest.approx(cost(x, other.centroids), rel=0.01)
    assert ours == pytest.approx(sklearn.inertia_, rel=0.01)


def test_bf16_iterations_cost_next_to_nothing():
    x = points(6000, d=32, centres=40, spread=1.0)
    assert cost(x, lloyd(x, 50, 25, 0, precision="bf16").centroids) == pytest.approx(
        cost(x, lloyd(x, 50, 25, 0).centroids), rel=0.01
    )


def test_one_iteration_is_that_of_scikit_learn():
    x = points(2000)
    start = seed_centroids(x, 20, 0)
    theirs = KMeans(20, init=start.numpy(), n_init=1, max_iter=1, algorithm="lloyd", tol=0).fit(x.numpy())
    ours = improve(start.numpy, lambda c, _: statistics_of(x, torch.from_numpy(c)), 1)
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, atol=1e-6)


def test_sums_do_not_depend_on_threads():
    x, threads = points(3000, d=48), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = statistics_of(x, x[:100])
        torch.set_num_threads(2)
        two = statistics_of(x, x[:100])
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(one.counts, two.counts)
    np.testing.assert_allclose(one.sums, two.sums, atol=1e-12)
    exact = np.zeros((100, 48))
    np.add.at(exact, assign(x, x[:100])[0].numpy(), x.double().numpy())
    np.testing.assert_allclose(one.sums, exact, atol=1e-5)


def test_an_empty_cluster_takes_half_of_the_largest():
    old = np.arange(12, dtype=np.float32).reshape(4, 3) + 1
    sums = np.array([[10, 20, 30], [0, 0, 0], [8, 8, 8], [0, 0, 0]], dtype=np.float64)
    new = updated(Statistics(sums, np.array([10, 0, 2, 0]), 1.0), old)
    np.testing.assert_allclose(new[[0, 2]], [[1, 2, 3], [4, 4, 4]])
    for row in (1, 3):
        np.testing.assert_allclose(new[row], [1, 2, 3], rtol=3e-3)
        assert not np.array_equal(new[row], new[0])
    assert not np.array_equal(new[1], new[3])
    nothing = updated(Statistics(np.eye(4, 3), np.array([1, 1, 1, 0]), 0.0), old)
    assert np.array_equal(nothing[3], old[3])


def test_no_cluster_stays_empty_where_points_differ():
    x = points(500)
    far = np.full((10, 16), 5, dtype=np.float32)
    far[0] = 0
    found = improve(lambda: far, lambda c, _: statistics_of(x, torch.from_numpy(c)), 30)
    assert (np.bincount(assign(x, torch.from_numpy(found.centroids))[0], minlength=10) > 0).all()


def test_it_stops_when_nothing_changes():
    found = lloyd(points(200, centres=3, spread=0.01), 3, 1000, 0)
    assert found.iterations < 10
    assert lloyd(points(200), 3, 0, 0).iterations == 0


def test_a_stopped_loop_goes_on_from_its_last_iteration(tmp_path):
    x = points(2000)
    whole = lloyd(x, 30, 8, 0)
    asked = []

    def statistics(centroids, iteration):
        asked.append(iteration)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return statistics_of(x, torch.from_numpy(centroids))

    start = seed_centroids(x, 30, 0)
    with pytest.raises(KeyboardInterrupt):
        improve(start.numpy, statistics, 8, tmp_path / "k.npz")
    found = improve(start.numpy, statistics, 8, tmp_path / "k.npz")
    assert asked == [0, 1, 2, 2, 3, 4, 5, 6, 7]
    assert np.array_equal(found.centroids, whole.centroids)
    again = improve(start.numpy, statistics, 8, tmp_path / "k.npz")
    assert np.array_equal(again.centroids, whole.centroids)
    assert len(asked) == 9
    assert [file.name for file in tmp_path.iterdir()] == ["k.npz"]
