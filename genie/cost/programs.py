"""What is measured: single ops at the sizes of real layers, and the microbenchmark's cases.

Each probe is a few calls of one op. Operands lie on the device already: each call reads other weights,
from memory, as in a model whose weights exceed the caches; activations are the same, since in a model
the op before has just made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from genie.workloads.microbenchmark import OpCase


@dataclass(frozen=True)
class Probe:
    """``call(tensors)`` runs the op once. ``inputs`` and ``weights``: shapes by name; ``ids``: names of
    inputs that are token ids below the given number. ``flops``: a rough guess, to choose how often to
    repeat it. ``held_out``: only judged on."""

    label: str
    call: Callable[[dict[str, Tensor]], Any]
    inputs: dict[str, tuple[int, ...]]
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    flops: float = 0.0
    held_out: bool = False

    @property
    def weight_elements(self) -> int:
        return sum(prod(s) for s in self.weights.values())

    @property
    def elements(self) -> int:
        return self.weight_elements + sum(prod(s) for s in self.inputs.values())


# -- single ops -----------------------------------------------------------------------------------


def linear(m: int, k: int, n: int) -> Probe:
    return Probe(
        f"linear {m}x{k}x{n}", lambda t: F.linear(t["x"], t["w"], t["b"]),
        {"x": (m, k)}, {"w": (n, k), "b": (n,)}, flops=2 * m * k * n,
    )  # fmt: skip


def addmm(m: int, k: int, n: int) -> Probe:
    return Probe(
        f"addmm {m}x{k}x{n}", lambda t: torch.addmm(t["b"], t["x"], t["w"]),
        {"x": (m, k)}, {"w": (k, n), "b": (n,)}, flops=2 * m * k * n,
    )  # fmt: skip


def bmm(count: int, m: int, k: int, n: int) -> Probe:
    return Probe(
        f"bmm {count}x{m}x{k}x{n}", lambda t: torch.bmm(t["x"], t["y"]),
        {"x": (count, m, k), "y": (count, k, n)}, flops=2 * count * m * k * n,
    )  # fmt: skip


def conv(images: int, px: int, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> Probe:
    padding = 0 if kernel == stride else kernel // 2
    return Probe(
        f"conv {images}x{cin}x{px}x{px}->{cout} k{kernel} s{stride} g{groups}",
        lambda t: F.conv2d(t["x"], t["w"], None, stride, padding, 1, groups),
        {"x": (images, cin, px, px)}, {"w": (cout, cin // groups, kernel, kernel)},
        flops=2 * images * (px // stride) ** 2 * cout * (cin // groups) * kernel**2,
    )  # fmt: skip


def attention(batch: int, heads: int, queries: int, keys: int, width: int, masked: bool = False) -> Probe:
    inputs: dict[str, tuple[int, ...]] = {
        "q": (batch, heads, queries, width),
        "k": (batch, heads, keys, width),
        "v": (batch, heads, keys, width),
    }
    if masked:
        inputs["mask"] = (batch, 1, queries, keys)
    return Probe(
        f"attention {batch}x{heads}x{queries}x{keys}x{width}" + (" masked" if masked else ""),
        lambda t: F.scaled_dot_product_attention(t["q"], t["k"], t["v"], attn_mask=t.get("mask")),
        inputs,
        flops=8 * batch * heads * queries * keys * width,
    )


def norm(rows: int, width: int) -> Probe:
    return Probe(
        f"layer_norm {rows}x{width}", lambda t: F.layer_norm(t["x"], (width,), t["w"], t["b"]),
        {"x": (rows, width), "w": (width,), "b": (width,)},
    )  # fmt: skip


def batch_norm(images: int, channels: int, px: int) -> Probe:
    per_channel = dict.fromkeys(("m", "v", "w", "b"), (channels,))
    return Probe(
        f"batch_norm {images}x{channels}x{px}x{px}",
        lambda t: F.batch_norm(t["x"], t["m"], t["v"], t["w"], t["b"]),
        {"x": (images, channels, px, px), **per_channel},
    )


def rows_op(label: str, call: Callable[[Tensor], Any], rows: int, width: int) -> Probe:
    return Probe(f"{label} {rows}x{width}", lambda t: call(t["x"]), {"x": (rows, width)})


def unary(label: str, call: Callable[[Tensor], Any], elements: int, slow: float = 1.0) -> Probe:
    return Probe(f"{label} {elements}", lambda t: call(t["x"]), {"x": (elements,)}, flops=slow * elements)


def binary(label: str, call: Callable[[Tensor, Tensor], Any], elements: int) -> Probe:
    shape = (elements,)
    return Probe(f"{label} {elements}", lambda t: call(t["x"], t["y"]), {"x": shape, "y": shape})


def embedding(count: int, table: int, width: int) -> Probe:
    return Probe(
        f"embedding {count} of {table}x{width}", lambda t: F.embedding(t["ids"], t["w"]),
        {"ids": (count,)}, {"w": (table, width)}, ids={"ids": table},
    )  # fmt: skip


def cat(rows: int, width: int) -> Probe:
    return Probe(
        f"cat 2x{rows}x{width}", lambda t: torch.cat([t["x"], t["y"]]),
        {"x": (rows, width), "y": (rows, width)},
    )  # fmt: skip


def turned(heads: int, rows: int, width: int) -> Probe:
    """The copy with which attention's heads are joined."""
    return Probe(
        f"contiguous {heads}x{rows}x{width}", lambda t: t["x"].transpose(0, 1).contiguous(),
        {"x": (heads, rows, width)},
    )  # fmt: skip


def pool(images: int, channels: int, px: int) -> Probe:
    return Probe(
        f"max_pool {images}x{channels}x{px}x{px}", lambda t: F.max_pool2d(t["x"], 3, 2, 1),
        {"x": (images, channels, px, px)}, flops=50 * images * channels * px * px,
    )  # fmt: skip


def mean_pool(images: int, channels: int, px: int) -> Probe:
    return Probe(
        f"adaptive_avg_pool {images}x{channels}x{px}x{px}", lambda t: F.adaptive_avg_pool2d(t["x"], (1, 1)),
        {"x": (images, channels, px, px)},
    )  # fmt: skip


# -- the set ---------------------------------------------------------------------------------------


def probes(scale: int = 1) -> Iterator[Probe]:
    """Real layers' sizes. ``scale`` multiplies tokens, images and elements: 1 for a CPU core, 8 for a GPU."""
    yield from _matmuls(scale)
    yield from _convs(scale)
    yield from _attentions(scale)
    yield from _others(scale)


def _matmuls(scale: int) -> Iterator[Probe]:
    for k, n in ((768, 768), (768, 3072), (3072, 768), (512, 2048)):
        for m in (1, 8, 48, 256):
            yield linear(m if m < 8 else m * scale, k, n)
    for m in (1, 16, 192):
        yield linear(m if m < 8 else m * scale, 128, 512)
        yield linear(m if m < 8 else m * scale, 2048, 1000)
    yield linear(1, 8, 8)
    yield linear(4 * scale, 512, 512)
    yield linear(512 * scale, 512, 512)
    yield linear(1, 768, 50257)
    yield linear(4, 768, 50257)
    for k, n in ((768, 768), (768, 3072), (3072, 768)):
        for m in (1, 8, 64, 512):
            yield addmm(m if m < 8 else m * scale, k, n)
    yield addmm(1, 8, 8)
    for n in (32, 64, 256):
        yield addmm(n * scale, n, n)
    for count, m, k, n in ((12, 128, 64, 128), (12, 128, 128, 64), (12, 1, 64, 256), (2, 8, 8, 8)):
        yield bmm(count * scale, m, k, n)


def _convs(scale: int) -> Iterator[Probe]:
    for px, narrow, wide in ((56, 64, 256), (28, 128, 512), (14, 256, 1024), (7, 512, 2048)):
        yield conv(scale, px, narrow, wide, 1)
        yield conv(scale, px, wide, narrow, 1)
        yield conv(scale, px, narrow, narrow, 3)
        yield conv(scale, px * 2, narrow, narrow, 3, stride=2)
        if px < 56:
            yield conv(scale, px * 2, wide // 2, wide, 1, stride=2)
            yield conv(scale, px * 2, wide // 2, narrow, 1)
    yield conv(4 * scale, 14, 256, 1024, 1)
    yield conv(4 * scale, 28, 128, 128, 3)
    yield conv(4 * scale, 7, 512, 512, 3)
    yield conv(1, 4, 8, 8, 1)
    yield conv(1, 8, 8, 8, 3)
    for px in (4, 8, 14):
        yield conv(2 * scale, px, 64, 64, 3)
    yield conv(scale, 224, 3, 64, 7, stride=2)
    yield conv(2 * scale, 32, 3, 64, 7, stride=2)
    yield conv(scale, 224, 3, 768, 32, stride=32)
    yield conv(scale, 224, 3, 768, 16, stride=16)
    yield conv(scale, 224, 3, 96, 4, stride=4)
    for px, channels, kernel in (
        (56, 96, 3),
        (28, 192, 3),
        (14, 384, 3),
        (7, 960, 3),
        (56, 96, 7),
        (14, 384, 7),
    ):
        yield conv(scale, px, channels, channels, kernel, groups=channels)
    yield conv(1, 4, 8, 8, 3, groups=8)
    yield conv(scale, 14, 512, 512, 3, groups=32)


def _attentions(scale: int) -> Iterator[Probe]:
    yield attention(1, 1, 1, 1, 64)
    for keys in (32, 160, 1024):
        yield attention(scale, 12, 1, keys, 64)
    for tokens in (16, 32, 128, 384):
        yield attention(scale, 12, tokens, tokens, 64)
    yield attention(4 * scale, 12, 50, 50, 64)
    yield attention(4 * scale, 12, 128, 128, 64)
    yield attention(2 * scale, 8, 197, 197, 64)
    yield attention(scale, 16, 128, 128, 128)
    for batch, tokens in ((1, 8), (12, 32), (4, 128)):
        yield attention(batch * scale, 8, tokens, tokens, 64, masked=True)


_SIZES = (256, 4096, 65_536, 262_144, 2_097_152)


def _others(scale: int) -> Iterator[Probe]:
    ops: list[tuple[str, Callable[[Tensor], Any], float]] = [
        ("relu", torch.relu, 1), ("gelu", F.gelu, 40), ("tanh", torch.tanh, 100),
        ("sigmoid", torch.sigmoid, 50), ("silu", F.silu, 50),
        ("pow", lambda x: torch.pow(x, 3.0), 5), ("exp", torch.exp, 40),
    ]  # fmt: skip
    for elements in _SIZES:
        yield binary("add", torch.add, elements * scale)
        yield binary("mul", torch.mul, elements * scale)
        yield unary("mul by a number", lambda x: x * 0.5, elements * scale)
        if elements in (256, 65_536, 2_097_152):
            for name, call, slow in ops:
                yield unary(name, call, elements * scale, slow)
    for rows, width in ((1, 256), (1, 768), (32, 768), (512, 768), (64, 512), (256, 1024), (1024, 1024)):
        yield norm(rows * scale, width)
    for channels, px in ((8, 2), (64, 56), (256, 14), (512, 7), (256, 56)):
        yield batch_norm(scale, channels, px)
    for rows, width in ((4, 16), (64, 64), (256, 256), (768, 768)):
        yield rows_op("softmax", lambda x: torch.softmax(x, -1), rows * scale, width)
        yield rows_op("sum", lambda x: x.sum(-1), rows * scale, width)
    for rows, width in ((1, 64), (1, 50257), (64, 64)):
        yield rows_op("argmax", lambda x: x.argmax(-1), rows * scale, width)
    for rows, width in ((4, 16), (256, 256), (768, 768)):
        yield rows_op("mean", lambda x: x.mean(-1), rows * scale, width)
    for count in (1, 16, 128, 1024):
        yield embedding(count * scale, 8192, 768)
    for rows, width in ((1, 64), (256, 64), (1536, 64), (256, 1024), (1024, 1024)):
        yield cat(rows * scale, width)
    for heads, rows, width in ((2, 4, 16), (12, 128, 64), (12, 1024, 64)):
        yield turned(heads * scale, rows, width)
    for channels, px in ((8, 8), (64, 32), (64, 112)):
        yield pool(scale, channels, px)
    for channels, px in ((8, 2), (2048, 7), (512, 7)):
        yield mean_pool(scale, channels, px)


#: the microbenchmark's ops at a size n, as genie/workloads/microbenchmark.py defines it
_CASES: dict[str, Callable[[int], Probe]] = {
    "matmul": lambda n: Probe(
        f"matmul {n}", lambda t: torch.matmul(t["x"], t["y"]), {"x": (n, n), "y": (n, n)}, flops=2 * n**3
    ),
    "linear": lambda n: linear(n, n, 4 * n),
    "conv2d": lambda n: conv(1, n, 64, 64, 3),
    "attention": lambda n: attention(1, 12, n, n, 64),
    "norm": lambda n: norm(n, 1024),
    "softmax": lambda n: rows_op("softmax", lambda x: torch.softmax(x, -1), n, n),
    "elementwise": lambda n: Probe(
        f"elementwise {n}", lambda t: F.gelu(t["x"] + t["y"]), {"x": (n, 1024), "y": (n, 1024)},
        flops=40 * n * 1024,
    ),
    "embedding": lambda n: embedding(n, 8192, 768),
    "reduction": lambda n: rows_op("sum", lambda x: x.sum(-1), n, n),
    "cat": lambda n: cat(n, 1024),
}  # fmt: skip


def microbenchmark_probes(cases: Sequence[OpCase]) -> list[Probe]:
    """One for each case, held out where the case is."""
    return [replace(_CASES[c.op](c.sizes[0]), label=c.name, held_out=c.held_out) for c in cases]
