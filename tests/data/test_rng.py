import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.data.rng import Stream, permutation, philox, shuffled_index, uniform


def _words(*values: int) -> tuple[np.ndarray, ...]:
    return tuple(np.array([v], dtype=np.uint64) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    # The known-answer vectors of Random123, the authors' own code.
    assert tuple(int(w[0]) for w in philox(_words(*counter), key)) == expected


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(1, 20), st.integers(0, 20))
def test_a_draw_depends_on_its_own_place_only(seed, position, draws, offset):
    alone = uniform(seed, Stream.CROPS, position, 1, offset=offset)
    among = uniform(seed, Stream.CROPS, np.array([position + 1, position]), draws, offset=offset)
    assert among[1, 0] == alone[0]
    assert ((among >= 0) & (among < 1)).all()


def test_streams_positions_and_seeds_do_not_share_numbers():
    numbers = [
        uniform(seed, stream, np.arange(50), 8).ravel()
        for seed in (0, 1, 2**33)
        for stream in (Stream.CROPS, Stream.ORDER)
    ]
    assert len(np.unique(np.concatenate(numbers))) == 6 * 50 * 8


def test_numbers_are_uniform_and_uncorrelated():
    x = uniform(7, Stream.CROPS, np.arange(20_000), 4)
    assert abs(x.mean() - 0.5) < 0.005
    assert abs(x.var() - 1 / 12) < 0.002
    assert np.abs(np.corrcoef(x.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(x[:-1, 0], x[1:, 0])[0, 1]) < 0.03


@given(st.integers(0, 2**62), st.integers(0, 1000), st.integers(1, 600))
def test_every_epoch_visits_every_image_once(seed, epoch, n):
    seen = shuffled_index(seed, np.full(n, epoch), np.arange(n), n)
    assert np.array_equal(np.sort(seen), np.arange(n))


def test_epochs_have_orders_of_their_own_and_mix_in_one_call():
    both = shuffled_index(0, np.repeat([0, 1], 100), np.tile(np.arange(100), 2), 100)
    assert np.array_equal(np.sort(both[100:]), np.arange(100))
    assert (both[:100] != both[100:]).mean() > 0.9
    assert np.array_equal(both[100:], shuffled_index(0, np.ones(100, int), np.arange(100), 100))


def test_a_billion_images_need_no_table():
    n = 1_300_000_000
    index = shuffled_index(3, np.zeros(1000, int), np.arange(1000), n)
    assert len(np.unique(index)) == 1000
    assert index.max() < n
    assert index.mean() == pytest.approx(n / 2, rel=0.1)


def test_permutations():
    order = permutation(0, Stream.STOCHASTIC_DEPTH, np.arange(3), 10)
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(10), (3, 1)))
    assert not np.array_equal(order[0], order[1])
