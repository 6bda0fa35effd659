import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opsin.data.order import Order
from opsin.data.rng import shuffled_index

orders = st.builds(Order, st.integers(1, 700), st.integers(1, 90), st.integers(1, 12))


@settings(max_examples=200, deadline=None)
@given(orders, st.integers(0, 2**63), st.integers(0, 2**20))
@example(Order(1, 7, 3), 0, 0)
@example(Order(6, 7, 3), 0, 0)
@example(Order(42, 7, 3), 0, 0)
@example(Order(43, 7, 3), 0, 0)
def test_every_epoch_holds_every_sample_once(order, seed, epoch):
    n = order.samples
    seen = order.indices(seed, epoch * n + np.arange(n))
    assert np.array_equal(np.sort(seen), np.arange(n))


@settings(max_examples=100, deadline=None)
@given(orders, st.integers(0, 2**63))
def test_a_window_of_positions_touches_a_window_of_blocks_which_no_other_touches(order, seed):
    n, size = order.samples, order.block * order.window
    blocks = order.indices(seed, np.arange(n)) // order.block
    if order.block == 1:
        return
    parts = [set(blocks[start : start + size].tolist()) for start in range(0, n, size)]
    assert all(len(part) <= order.window for part in parts)
    assert sum(len(part) for part in parts) == -(-n // order.block)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2**63), st.integers(1, 9))
def test_single_files_keep_the_order_they_always_had(n, seed, window):
    position = np.arange(3 * n)
    expected = shuffled_index(seed, position // n, position % n, n)
    assert np.array_equal(Order(n).indices(seed, position), expected)
    assert np.array_equal(Order(n, 1, window).indices(seed, position), expected)


def test_an_order_that_was_written_down():
    """Runs resume under later versions: these values must never change."""
    assert Order(10).indices(0, np.arange(10)).tolist() == SINGLE
    assert Order(10, 3, 2).indices(7, np.arange(20)).tolist() == BLOCKS


SINGLE = [8, 0, 4, 3, 9, 5, 7, 6, 2, 1]
BLOCKS = [8, 0, 6, 2, 7, 1, 9, 3, 4, 5, 3, 4, 8, 6, 7, 5, 1, 9, 2, 0]


def test_epochs_seeds_and_windows_differ():
    order = Order(1000, 10, 5)
    first, second = (order.indices(0, epoch * 1000 + np.arange(1000)) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, order.indices(1, np.arange(1000)))
    alone = Order(30, 30, 4)  # one block, whose samples are all that can be shuffled
    assert not np.array_equal(*alone.indices(0, np.arange(60)).reshape(2, 30))
    # Within windows too: ranks of the samples inside two windows are other permutations.
    inside = [np.argsort(np.argsort(first[start : start + 50])) for start in (0, 50)]
    assert not np.array_equal(*inside)


def test_blocks_and_the_samples_of_a_window_are_well_mixed():
    order = Order(100_000, 100, 50)
    seen = order.indices(3, np.arange(100_000))
    assert abs(np.corrcoef(np.arange(100_000), seen)[0, 1]) < 0.15  # 1,000 blocks in 20 windows
    window = seen[:5000] // 100
    assert (window[1:] == window[:-1]).mean() < 0.04  # a random neighbour is of the same block once in 50


@pytest.mark.parametrize("order", [Order(1_200_000_000, 160, 64), Order(2**40 + 1, 1000, 64)])
def test_a_billion_samples_cost_nothing(order):
    position = np.array([0, 1, order.samples - 1, order.samples, 37 * order.samples + 5])
    index = order.indices(1, position)
    assert ((index >= 0) & (index < order.samples)).all()
    assert np.array_equal(order.indices(1, position[3:]), index[3:])


def test_other_processes_find_the_same_order():
    code = (
        "import numpy as np; from opsin.data.order import Order\n"
        "print(Order(1003, 17, 4).indices(2**40 + 3, np.arange(2006)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(Order(1003, 17, 4).indices(2**40 + 3, np.arange(2006)).tolist())
