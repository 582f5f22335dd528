"""Work for a worker process that hangs; imports nothing that takes time."""

import time


def make_sleeper(seconds):
    return lambda chunk: time.sleep(seconds)
