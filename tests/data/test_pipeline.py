import threading
import time
from contextlib import closing

import pytest
import torch

from opsin.data.pipeline import prepared

BATCHES = [range(3), range(3, 5), range(5, 5), range(9, 12)]


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
@pytest.mark.parametrize("workers", [1, 4])
def test_batches_come_in_order_whatever_finishes_first(workers, ahead):
    def slow_at_first(index):
        time.sleep(0.02 if index in (0, 3) else 0)
        return -index

    found = list(prepared(slow_at_first, BATCHES, workers=workers, ahead=ahead))
    assert found == [[-index for index in batch] for batch in BATCHES]


def test_no_more_than_asked_for_is_prepared_ahead():
    begun = []
    with closing(prepared(begun.append, ([i] for i in range(100)), workers=2, ahead=3)) as batches:
        for number, _ in enumerate(batches):
            time.sleep(0.01)
            assert len(begun) <= number + 4
            if number == 5:
                break
    time.sleep(0.05)
    assert len(begun) <= 9  # closed: nothing begins any more


def test_an_error_arrives_and_the_threads_end():
    def fail(index):
        if index == 4:
            raise ValueError("four")
        return index

    before = threading.active_count()
    batches = prepared(fail, BATCHES, workers=3, ahead=2)
    assert next(batches) == [0, 1, 2]
    with pytest.raises(ValueError, match="four"):
        next(batches)
    assert threading.active_count() == before


def test_workers_use_one_core_each_and_leave_this_thread_its_own():
    torch.set_num_threads(2)
    counts = list(prepared(lambda _: torch.get_num_threads(), [range(8)], workers=2, ahead=1))
    assert set(counts[0]) == {1}
    assert torch.get_num_threads() == 2
