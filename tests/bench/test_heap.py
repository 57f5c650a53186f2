"""Between cells: garbage goes, and what is left is out of the collector's way."""

import gc
import weakref

import pytest

from genie.bench import heap


class Node:
    """Garbage only the collector can free, when it refers to itself."""

    def __init__(self):
        self.me = self


@pytest.fixture(autouse=True)
def thawed():
    yield
    gc.unfreeze()


def test_new_garbage_is_collected_and_the_rest_is_frozen():
    heap.settle()
    garbage = weakref.ref(Node())
    kept = Node()
    heap.settle()
    assert garbage() is None
    assert not any(found is kept for found in gc.get_objects()), "frozen objects are not looked at"


def test_frozen_garbage_goes_once_the_memory_has_grown(monkeypatch):
    kept = Node()
    heap.settle()
    frozen = weakref.ref(kept)
    del kept
    heap.settle()
    assert frozen() is not None
    monkeypatch.setattr(heap, "GROWTH_BYTES", -(2**40))  # any size of this process is growth
    heap.settle()
    assert frozen() is None
