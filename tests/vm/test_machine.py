import pytest
from machine import Talk

_SAID = b"m4rk GUEST_READY\none\n\nother GUEST_RC=0\ntwo\n\nm4rk GUEST_RC=7\nlate"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_end_is_found_however_the_bytes_come(size: int) -> None:
    pieces: list[bytes] = []
    talk = Talk("m4rk", pieces.append)
    for start in range(0, len(_SAID), size):
        talk.feed(_SAID[start : start + size], start + 1)
    assert talk.done()
    assert talk.rc() == 7
    assert talk.text() == "one\n\nother GUEST_RC=0\ntwo\n"
    assert b"".join(pieces).decode() == talk.text()
    assert 0 < talk.booted <= talk.ended


def test_nothing_counts_before_the_guest_is_up() -> None:
    talk = Talk("m4rk", None)
    talk.feed(b"\nm4rk GUEST_RC=0\n", 1)
    assert not talk.done()


def test_what_was_kept_back_comes_out_when_the_guest_is_gone() -> None:
    pieces: list[bytes] = []
    talk = Talk("m4rk", pieces.append)
    talk.feed(b"m4rk GUEST_READY\none\n", 1)
    assert pieces == [b"one"]
    talk.flush()
    assert pieces == [b"one", b"\n"]
    assert talk.text() == "one\n"
