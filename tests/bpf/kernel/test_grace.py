"""Waiting for the programs that run now."""

import threading
import time

from fimbria.kernel.grace import GracePeriod


def test_it_lasts_a_grace_period_and_lets_others_run_meanwhile() -> None:
    grace = GracePeriod()
    turns = 0
    done = threading.Event()

    def others() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(0.001)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        before, waits = turns, 0
        while waits < 5 or (turns == before and waits < 1000):  # others run as soon as there is a processor for them
            grace.wait()
            waits += 1
        assert turns > before
    finally:
        done.set()
        thread.join()
        grace.close()
