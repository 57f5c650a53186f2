"""What generated kernels record: the same instructions, values and call sites as the general path."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

import genie
from genie.errors import RemoteOpError
from genie.frontend import kernels
from genie.frontend.session import Session
from genie.frontend.tensor import LazyTensor


def remote(n: int = 6) -> LazyTensor:
    """A tensor that the host does not know the value of."""
    return torch.arange(n, dtype=torch.float32).to("genie") * 1.0


@torch.no_grad()
def test_numbers_of_every_kind_at_one_position(session: Session) -> None:
    x, t = remote(2), remote(2) + 1
    for _ in range(3):
        assert (x + 1).tolist() == [1, 2] and (x + 1.5).tolist() == [1.5, 2.5]
        assert (x + True).tolist() == [1, 2] and (x + t).tolist() == [1, 3]
        assert (x * 0.25).tolist() == [0, 0.25] and (x * 3.0).tolist() == [0, 3]
        assert torch.add(x, t, alpha=2).tolist() == [2, 5] and torch.add(x, t, alpha=0.5).tolist() == [0.5, 2]
        assert (2 - x).tolist() == [2, 1] and (x - 2).tolist() == [-2, -1]
        assert (x + torch.tensor(5.0)).tolist() == [5, 6]  # a CPU scalar joins in
        assert (x.long() * 2).dtype == torch.int64 and (x.long() * 2.0).dtype == torch.float32


@torch.no_grad()
def test_optional_and_left_out_arguments(session: Session) -> None:
    x, w, b = remote(6).view(2, 3), remote(3), remote(3) + 2
    host = torch.arange(6.0).view(2, 3)
    for _ in range(3):
        for weight, bias in ((None, None), (w, None), (None, b), (w, b)):
            got = torch.nn.functional.layer_norm(x, [3], weight, bias)
            plain = [v if v is None else v.cpu() for v in (weight, bias)]
            torch.testing.assert_close(got.cpu(), torch.nn.functional.layer_norm(host, [3], *plain))
        assert x[:, 1:].tolist() == [[1, 2], [4, 5]] and x[:, ::2].tolist() == [[0, 2], [3, 5]]
        for approximate in ("none", "tanh"):
            expected = torch.nn.functional.gelu(host, approximate=approximate)
            torch.testing.assert_close(torch.nn.functional.gelu(x, approximate=approximate).cpu(), expected)
        assert [p.tolist() for p in x.split(2, 1)] == [[[0, 1], [3, 4]], [[2], [5]]]


@torch.no_grad()
def test_an_error_names_the_line_of_its_own_recording(session: Session) -> None:
    table = remote(6).view(3, 2)

    def good() -> torch.Tensor:
        return torch.embedding(table, (remote(2) * 1).long())

    for _ in range(3):
        good().cpu()
    bad = (remote(2) + 90).long()
    row = torch.embedding(table, bad)  # this very line
    with pytest.raises(RemoteOpError, match="this very line"):
        row.cpu()


@torch.no_grad()
def test_programs_that_share_a_prefix(session: Session) -> None:
    for _ in range(3):
        for turn in (0, 1, 2):
            x = remote(4).view(2, 2)
            y = x + 1
            y = y * 2 if turn == 0 else y.t() if turn == 1 else y + x
            assert y.tolist() == [[[2, 4], [6, 8]], [[1, 3], [2, 4]], [[1, 3], [5, 7]]][turn]


@torch.no_grad()
def test_an_empty_is_recorded_at_its_first_use_by_a_kernel(session: Session) -> None:
    x = remote(3)
    unused = torch.empty(3, device="genie")
    joined = torch.cat([x, torch.empty(2, device="genie"), x])
    assert joined.shape == (8,) and joined[:3].tolist() == [0, 1, 2] and joined[5:].tolist() == [0, 1, 2]
    assert (unused * 0).shape == (3,)


@torch.no_grad()
def test_a_gradient_goes_the_general_way(session: Session) -> None:
    w = torch.nn.Parameter(torch.ones(3, device="genie"))
    for _ in range(2):
        (w * 2).tolist()
        with torch.enable_grad():
            loss = (w * w.detach().view(3)).sum()
        assert loss.requires_grad


def test_what_is_not_held_when_its_program_ends_is_not_kept() -> None:
    with torch.no_grad(), genie.local() as session:
        x = remote(100)
        kept = (x * 2) + 1
        alias, watched = kept.detach(), weakref.ref(kept)
        program = session.recorder._finish()
        assert len(program.kept_handles()) == 2  # x and kept; what was between them died
        del kept
        gc.collect()
        assert watched() is None and alias._h.gid not in session.recorder.dead
        gid = alias._h.gid
        del alias
        assert session.recorder.dead == [gid]


def test_threads_record_side_by_side(session: Session) -> None:
    failures: list[object] = []

    def work(offset: float) -> None:
        with torch.no_grad():
            for i in range(30):
                x = remote(4) + offset
                if (x.view(2, 2).t() * 2 + i)[1, 0].item() != 2 * (1 + offset) + i:
                    failures.append((offset, i))

    threads = [threading.Thread(target=work, args=(k,)) for k in (0.0, 10.0)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not failures and not any(t.is_alive() for t in threads)


def test_the_hottest_ops_have_kernels() -> None:
    assert kernels.count() >= 60
