"""The scripts and tests of this directory share datapath.py and its neighbours, and these fixtures."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from datapath import Datapath
from record import NATIVE, OVERLAY
from sockets import Net, Services, loaded


@pytest.fixture(scope="module")
def dp() -> Iterator[Datapath]:
    """With the overlay."""
    with_overlay = Datapath(OVERLAY)
    yield with_overlay
    with_overlay.close()


@pytest.fixture(scope="module")
def native() -> Iterator[Datapath]:
    """Without it."""
    without = Datapath(NATIVE)
    yield without
    without.close()


@pytest.fixture(scope="module")
def socket_node() -> Iterator[tuple[Services, Net]]:
    with loaded() as pair:
        yield pair


@pytest.fixture
def services(socket_node: tuple[Services, Net]) -> Iterator[Services]:
    """Rows of services for sockets, gone after each test."""
    yield socket_node[0]
    socket_node[0].clear()


@pytest.fixture
def net(socket_node: tuple[Services, Net]) -> Iterator[Net]:
    """Sockets, closed after each test."""
    yield socket_node[1]
    socket_node[1].close()
