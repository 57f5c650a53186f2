"""The digest of contents: one construction, whoever hashes and in whatever pieces."""

from __future__ import annotations

import hashlib
import os
import random
import struct
import subprocess
import sys

import pytest

from genie.wire.digest import CHUNK, ContentHash, digest


def by_definition(data: bytes) -> bytes:
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    outer = b"genie content 1" + struct.pack("<QQ", CHUNK, len(data))
    return hashlib.sha256(outer + b"".join(hashlib.sha256(c).digest() for c in chunks)).digest()


@pytest.mark.parametrize("nbytes", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 17, 16 * CHUNK])
def test_the_digest_is_the_one_of_its_definition(nbytes):
    data = random.Random(nbytes).randbytes(nbytes)
    assert digest(data) == by_definition(data)
    for size in (CHUNK, 3 * CHUNK):
        content = ContentHash(nbytes)
        for at in range(0, nbytes, size):
            content.add(memoryview(data)[at : at + size])
        assert content.digest() == by_definition(data)
        assert content.done


def test_one_core_computes_the_same():
    """In a process of its own, for the threads are shared."""
    data = random.Random(7).randbytes(3 * CHUNK + 5)
    script = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from genie.wire.digest import digest, threads; assert threads() == 0;"
        "print(digest(sys.stdin.buffer.read()).hex())"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], input=data, capture_output=True, check=True, timeout=120
    )
    assert out.stdout.decode().strip() == digest(data).hex()


def test_a_forked_child_has_threads_of_its_own():
    data = random.Random(8).randbytes(4 * CHUNK)
    expected = digest(data)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, digest(data))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as out:
        assert out.read() == expected
    os.waitpid(child, 0)


def test_contents_that_differ_in_length_or_place_of_a_chunk_differ():
    a, b = bytes(CHUNK), b"\1" * CHUNK
    contents = [b"", a, b, a + b, b + a, a + a, a + a[:-1], a + a + b"\0"]
    assert len({digest(c) for c in contents}) == len(contents)


def test_pieces_must_be_whole_chunks_and_complete():
    content = ContentHash(CHUNK + 10)
    content.add(memoryview(bytes(10)))
    with pytest.raises(ValueError, match="multiples"):
        content.add(memoryview(bytes(CHUNK)))
    with pytest.raises(ValueError, match="not 1048586"):
        content.digest()
