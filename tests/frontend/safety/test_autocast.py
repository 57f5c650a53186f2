"""Autocast on device genie casts what PyTorch casts on its own accelerators."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import genie
from genie.frontend import autocast
from tests.frontend.safety.compare import assert_same, numbers

DTYPES = [torch.float16, torch.bfloat16]


def test_the_lists_are_those_of_the_installed_pytorch() -> None:
    cuda = {
        name.removeprefix("aten::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::")
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA")
        and not name.startswith(("aten::cudnn_", "aten::_cudnn_"))
        # Overloads for named tensors, which PyTorch 2.11 still has.
        and "imname" not in name
        and ".names_" not in name
    }
    assert set(autocast.policies()) == cuda


#: (op, dtype it gives for float32 inputs, with None for "the autocast dtype")
EXPECTED = {
    "mm": (lambda x, w: x @ w, None),
    "bmm": (lambda x, w: torch.bmm(x[None], w[None]), None),
    "linear": (lambda x, w: functional.linear(x, w, x[0]), None),
    "addmm": (lambda x, w: torch.addmm(x, x, w), None),
    "einsum": (lambda x, w: torch.einsum("ij,jk->ik", x, w), None),
    "matmul_vector": (lambda x, w: w @ x[0], None),
    "conv2d": (lambda x, w: functional.conv2d(x.view(1, 1, 4, 4), w.view(1, 1, 4, 4)), None),
    "attention": (lambda x, w: functional.scaled_dot_product_attention(x[None], w[None], w[None]), None),
    "softmax": (lambda x, w: (x @ w).softmax(-1), torch.float32),
    "log_softmax": (lambda x, w: (x @ w).log_softmax(-1), torch.float32),
    "sum": (lambda x, w: (x @ w).sum(), torch.float32),
    "sum_given_dtype": (lambda x, w: (x @ w).sum(dtype=torch.float64), torch.float64),
    "norm": (lambda x, w: (x @ w).norm(), torch.float32),
    "norm_dim": (lambda x, w: (x @ w).norm(dim=1, keepdim=True), torch.float32),
    "layer_norm": (lambda x, w: functional.layer_norm(x @ w, (4,)), torch.float32),
    "exp": (lambda x, w: (x @ w).exp(), torch.float32),
    "pow": (lambda x, w: (x @ w) ** 2, torch.float32),
    "cross_entropy": (lambda x, w: functional.cross_entropy(x @ w, x.argmax(-1)), torch.float32),
    "mse_loss": (lambda x, w: functional.mse_loss(x @ w, x @ w + 1), torch.float32),
    "addcmul_of_mixed": (lambda x, w: torch.addcmul(x, x @ w, x @ w), torch.float32),
    "addcmul_of_low": (lambda x, w: torch.addcmul(x @ w, x @ w, x @ w), None),
    "relu_follows": (lambda x, w: (x @ w).relu(), None),
    "add_promotes": (lambda x, w: (x @ w) + x, torch.float32),
    "cov_taken_apart": (lambda x, w: torch.cov(x), None),
    "inner_as_tensordot": (lambda x, w: torch.inner(x, w), torch.float32),
    "float64_left_alone": (lambda x, w: x.double() @ w.double(), torch.float64),
    "integers_left_alone": (lambda x, w: x.long().sum(), torch.int64),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("op", EXPECTED)
def test_the_dtype_of_a_result(op: str, grad: bool, dtype: torch.dtype) -> None:
    f, expected = EXPECTED[op]
    expected = expected or dtype
    with genie.local(), torch.set_grad_enabled(grad):
        x, w = numbers("genie", 4, 4).requires_grad_(), numbers("genie", 4, 4, seed=1).requires_grad_()
        with torch.autocast("genie", dtype=dtype):
            got = f(x, w)
        assert got.dtype == expected
        reference = f(x.detach().cpu(), w.detach().cpu())  # all in float32
        torch.testing.assert_close(got.detach().cpu().double(), reference.double(), rtol=0.05, atol=0.05)
        assert f(x, w).dtype == reference.dtype  # nothing stays on


def small(device: str) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)).to(device)


def test_a_model_gives_what_autocast_on_the_cpu_gives(capture) -> None:
    # bfloat16 has 8 bits: kernels of the two devices may round a sum to neighbours (2**-8 relative).
    model, remote = small("cpu"), small("genie")
    run, x = capture(remote), numbers("cpu", 3, 8)
    for enabled in (True, False, True):
        model.zero_grad()
        remote.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            expected = model(x)
        with torch.autocast("genie", dtype=torch.bfloat16, enabled=enabled):
            got = run(x.to("genie"))
        assert got.dtype == expected.dtype == (torch.bfloat16 if enabled else torch.float32)
        tolerance = 2**-6 if enabled else 1e-5
        torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance)
        got.float().square().sum().backward()
        expected.float().square().sum().backward()
        for p, q in zip(remote.parameters(), model.parameters(), strict=True):
            assert p.grad.dtype == torch.float32
            torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_autocast_entered_inside_the_program(capture) -> None:
    model = small("genie")

    def f(x):
        with torch.autocast("genie", dtype=torch.bfloat16):
            y = model[0](x)
            with torch.autocast("genie", enabled=False):
                z = model[0](x)
        return y, z, model[0](x)

    run, x = capture(f), numbers("genie", 2, 8)
    for _ in range(2):
        assert [t.dtype for t in run(x)] == [torch.bfloat16, torch.float32, torch.float32]


def test_autocast_of_another_device_leaves_genie_alone(remote) -> None:
    model, x = small("genie"), numbers("genie", 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.float32
    with torch.autocast("genie", dtype=torch.bfloat16):
        assert small("cpu")(x.cpu()).dtype == torch.float32


def test_a_tensor_of_an_unsupported_dtype_is_refused_where_dtypes_must_agree(remote) -> None:
    x = numbers("genie", 4)
    with torch.autocast("genie", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="autocast"):
        torch.addcmul(x, x.half(), x)


def test_an_op_that_is_unsafe_under_autocast_names_the_remedy(remote) -> None:
    x = numbers("genie", 4).sigmoid()
    with torch.autocast("genie"), pytest.raises(RuntimeError, match="BCEWithLogitsLoss"):
        functional.binary_cross_entropy(x, x)


def test_a_gradient_scaler_trains_in_float16(remote) -> None:
    model, x = small("genie"), numbers("genie", 16, 8)
    y, scaler = numbers("genie", 16, 4, seed=2), torch.amp.GradScaler("genie", init_scale=1024.0)
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        step.zero_grad()
        with torch.autocast("genie", dtype=torch.float16):
            loss = functional.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(step)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and scaler.get_scale() == 1024.0


@torch.no_grad()
def test_the_same_numbers_as_casting_by_hand(remote) -> None:
    model, x = small("genie"), numbers("genie", 3, 8)
    with torch.autocast("genie", dtype=torch.bfloat16):
        got = model[0](x)
    by_hand = functional.linear(x.bfloat16(), model[0].weight.bfloat16(), model[0].bias.bfloat16())
    assert_same(got, by_hand.cpu())
