"""Errors of a write reach the main thread, whatever they are, and nothing waits for ever."""

import threading

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


def test_what_is_not_done_at_the_end_is_said():
    """Also of the copy, which nobody else waits for when a run ends with an error."""

    def refuse() -> None:
        raise TypeError("the store is gone")

    assert Saver(print).finish(0.1) == ""
    begun, release = threading.Event(), threading.Event()
    slow = Saver(print)
    slow.copy_with("copying", lambda: [begun.set(), release.wait()])
    assert begun.wait(10) and slow.finish(0.1) == "not done within 0 s"
    release.set()
    assert slow.finish(10.0) == ""
    refused = Saver(print)
    refused.copy_with("copying", refuse)
    assert refused.finish(10.0) == "the store is gone"
