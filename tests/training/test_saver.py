"""Errors of a write reach the main thread, whatever they are, and nothing waits for ever."""

import pytest

from tinybert_jax.training.saver import SaveError, Saver


@pytest.mark.parametrize("error", [TypeError, MemoryError, KeyError, SystemExit])
def test_a_bug_in_a_write_ends_the_run(error):
    def write() -> None:
        raise error("a bug")

    saver = Saver(print)
    with pytest.raises(error):
        for number in range(4):  # the queue holds one: a dead thread would block here
            saver.submit(f"write {number}", write)
        saver.wait()
    with pytest.raises(error):
        saver.check()


def test_later_writes_are_left_out_after_an_error():
    written = []

    def refuse() -> None:
        raise TypeError("a bug")

    saver = Saver(print)
    with pytest.raises(TypeError):
        saver.submit("first", refuse)
        saver.submit("second", lambda: written.append(1))
        saver.wait()
    assert not written and issubclass(SaveError, OSError)
