"""Tensor specs and tensors: checks before anything is allocated, bytes without copies."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from genie.errors import ProtocolError
from genie.wire.buffers import new_payload
from genie.wire.framing import offsets
from genie.wire.messages import TensorSpec

_NAMES = (
    "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 "
    "complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz"
)
DTYPES: dict[str, torch.dtype] = {n: getattr(torch, n) for n in _NAMES.split() if hasattr(torch, n)}
DTYPE_NAMES: dict[torch.dtype, str] = {d: n for n, d in DTYPES.items()}

_MAX_ELEMENTS = 1 << 60
_SMALL = 64 << 10
PINNED_UP_TO = 64 << 20  # what is larger would stay pinned, and the host needs its memory


def dense_strides(shape: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor, in elements."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return strides[::-1]


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill memory without holes or overlaps, in whatever order of dimensions."""
    if 0 in shape:
        return True
    step = 1
    for s, n in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n != 1):
        if s != step:
            return False
        step *= n
    return True


def check_spec(spec: TensorSpec) -> tuple[torch.dtype, int]:
    """The dtype, and the bytes of storage from its start that the geometry reaches.

    Raises ProtocolError for geometry that no tensor can have. Nothing is allocated.
    """
    dtype = DTYPES.get(spec.dtype)
    if dtype is None:
        raise ProtocolError(f"dtype {spec.dtype!r} cannot travel: use one of {', '.join(DTYPES)}")
    shape, stride = spec.shape, spec.stride
    if len(shape) != len(stride) or len(shape) > 64:
        raise ProtocolError(f"a shape of {len(shape)} dimensions with {len(stride)} strides is no tensor")
    if spec.offset < 0 or min(shape, default=0) < 0 or min(stride, default=0) < 0:
        raise ProtocolError(f"negative size, stride or offset: {shape}, {stride}, {spec.offset}")
    elements, reach = 1, spec.offset + 1
    for n, s in zip(shape, stride, strict=True):
        elements *= n
        reach += (n - 1) * s
    if elements == 0:
        reach = 0
    if max(elements, reach, spec.offset, max(shape, default=0), max(stride, default=0)) > _MAX_ELEMENTS:
        raise ProtocolError(f"a tensor of shape {shape}, strides {stride} is too large to exist")
    return dtype, reach * dtype.itemsize


def dense_nbytes(spec: TensorSpec) -> int:
    """Bytes of a tensor that is alone in its payload. Raises ProtocolError when it would have holes."""
    _, nbytes = check_spec(spec)
    if spec.offset or spec.storage != -1 or not is_dense(spec.shape, spec.stride):
        raise ProtocolError(f"a tensor alone in a payload must be dense: {spec}")
    return nbytes


def spec_of(tensor: Tensor, storage: int = -1) -> TensorSpec:
    """The true geometry in the tensor's storage; offset 0 when it is to travel alone (-1)."""
    name = DTYPE_NAMES.get(tensor.dtype)
    if name is None:
        raise ProtocolError(f"a tensor of {tensor.dtype} cannot travel: convert it first")
    offset = 0 if storage == -1 else int(tensor.storage_offset())
    return TensorSpec(name, list(tensor.shape), list(tensor.stride()), offset, storage)


def over_storage(storage: torch.UntypedStorage, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """A tensor with the (checked) geometry over ``storage``; it copies nothing."""
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, spec.offset, spec.shape, spec.stride)


def bytes_of_storage(storage: torch.UntypedStorage) -> memoryview:
    """The bytes of a CPU storage, not copied. The storage must outlive the view."""
    return _bytes_at(storage.data_ptr(), storage.nbytes())


def to_wire(tensor: Tensor) -> tuple[TensorSpec, memoryview, Tensor]:
    """Spec and bytes of a tensor that travels alone, and the dense CPU tensor that owns the bytes."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.device.type != "cpu":
        tensor = _to_host(tensor)
    if not tensor.is_contiguous() and not is_dense(tensor.shape, tensor.stride()):
        tensor = tensor.contiguous()
    spec = spec_of(tensor)
    return spec, _bytes_at(tensor.data_ptr(), tensor.nbytes), tensor


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU, dense, in the same order of dimensions. Large ones go through pinned memory,
    which torch keeps and uses again (measured elsewhere: 55 GB/s against 2-18)."""
    pinned = _SMALL <= tensor.nbytes <= PINNED_UP_TO and tensor.is_cuda
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor)


def _bytes_at(address: int, nbytes: int) -> memoryview:
    # numpy has no bfloat16 and copies no 0-dim view as bytes; an address serves every dtype alike.
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B") if nbytes else memoryview(b"")


def split_payload(payload: Tensor, sizes: Sequence[int]) -> list[torch.UntypedStorage]:
    """One storage for each piece. A large piece shares memory with the payload, a small one is copied
    so that it does not keep the whole payload alive. Raises ProtocolError when sizes do not add up."""
    if min(sizes, default=0) < 0:
        raise ProtocolError(f"negative storage size in {list(sizes)[:8]}")
    starts, end = offsets(sizes)
    if end != payload.numel():
        raise ProtocolError(f"the payload has {payload.numel()} bytes, but the header describes {end}")
    whole = payload.untyped_storage()
    if len(sizes) == 1:
        return [whole]
    pieces = []
    for start, size in zip(starts, sizes, strict=True):
        if size < _SMALL:
            piece = new_payload(size)
            piece.copy_(payload[start : start + size])
            pieces.append(piece.untyped_storage())
        else:
            pieces.append(whole[start : start + size])
    return pieces


def unpack(payload: Tensor, specs: Sequence[TensorSpec], storages: Sequence[int] = ()) -> list[Tensor]:
    """The tensors of a payload: shared storages come first in it, then the tensors that travel alone.

    Raises ProtocolError for geometry that leaves its storage.
    """
    sizes = [*storages, *(dense_nbytes(s) for s in specs if s.storage == -1)]
    pieces = split_payload(payload, sizes)
    tensors, alone = [], len(storages)
    for spec in specs:
        dtype, nbytes = check_spec(spec)
        if spec.storage == -1:
            storage = pieces[alone]
            alone += 1
        elif not 0 <= spec.storage < len(storages) or nbytes > storages[spec.storage]:
            raise ProtocolError(f"{spec} leaves its storage, or names one that the payload lacks")
        else:
            storage = pieces[spec.storage]
        tensors.append(over_storage(storage, spec, dtype))
    return tensors
