import signal
import threading

import pytest

from mili.turns import Turns


def test_a_task_waits_for_a_pause_or_the_end():
    turns, done = Turns(), list[int]()
    turns.later(lambda: done.append(1))
    assert done == [1]
    with turns.take() as pause:
        turns.later(lambda: done.append(2))
        with turns.take() as inner_pause:
            inner_pause()
        assert done == [1], "a turn inside another one may be in mid-step"
        pause()
        assert done == [1, 2]
        thread = threading.Thread(target=lambda: turns.later(lambda: done.append(3)))
        thread.start()
        thread.join()
        assert done == [1, 2]
    assert done == [1, 2, 3]


def test_ctrl_c_waits_for_a_pause():
    turns, done = Turns(), list[int]()
    with pytest.raises(KeyboardInterrupt), turns.take() as pause:
        signal.raise_signal(signal.SIGINT)
        turns.later(lambda: done.append(1))
        pause()
    assert done == [1]
    with turns.take():
        pass
