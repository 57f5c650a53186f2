"""Registers device ``genie`` with PyTorch (PrivateUse1, in pure Python) and its module ``torch.genie``."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from genie.errors import UnsupportedOpError
from genie.frontend import tensor as _tensor


@contextlib.contextmanager
def _selected(device: object) -> Iterator[None]:
    """``with torch.genie.device(0):``. There is one device; another index raises ValueError."""
    index = device if isinstance(device, int) else torch.device(device).index  # type: ignore[call-overload]
    if index not in (None, 0, -1):
        raise ValueError(f"device 'genie' has the index 0 only, not {index}: open a session per server")
    yield


def _module() -> types.ModuleType:
    m = types.ModuleType("torch.genie", "Device functions of the remote device 'genie'.")

    def manual_seed_all(seed: int) -> None:
        from genie.frontend import session

        session.seed_current(seed)

    def get_rng_state(device: object = "genie") -> torch.Tensor:
        from genie.frontend import session

        return session.current_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: object = "genie") -> None:
        from genie.frontend import session

        session.set_current_rng_state(new_state)

    m.device = _selected  # type: ignore[attr-defined]
    m._initialized = True  # type: ignore[attr-defined] # torch.utils.checkpoint keeps random states only then
    m.get_rng_state = get_rng_state  # type: ignore[attr-defined]
    m.set_rng_state = set_rng_state  # type: ignore[attr-defined]
    m.is_available = lambda: True  # type: ignore[attr-defined]
    m.is_initialized = lambda: True  # type: ignore[attr-defined]
    m.device_count = lambda: 1  # type: ignore[attr-defined]
    m.current_device = lambda: 0  # type: ignore[attr-defined]
    m._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    m.manual_seed_all = manual_seed_all  # type: ignore[attr-defined]
    m.manual_seed = manual_seed_all  # type: ignore[attr-defined]
    m.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]  # type: ignore[attr-defined]

    def synchronize(device: object = None) -> None:
        from genie.frontend import session

        session.current().synchronize()

    m.synchronize = synchronize  # type: ignore[attr-defined]
    return m


def _is_ours(storage: object) -> None:
    return None  # storages of device genie cannot be written to a file: tensors refuse to be pickled


def _refuse_storage(storage: object, location: str) -> None:
    if location.startswith("genie"):
        raise UnsupportedOpError(
            "torch.load cannot place what it reads on device 'genie': load with map_location='cpu', and move "
            "the tensors or the model with .to('genie'), or call load_state_dict of a model that is there"
        )


def register() -> None:
    """Idempotent. Also teaches `Module.to` to keep Parameter objects (see `moving`)."""
    if _tensor._DEVICE:
        return
    _setup_privateuseone_for_python_backend(rename="genie", backend_module=_module())
    _tensor._DEVICE.append(torch.device("genie", 0))
    from genie.frontend import autocast, composites, direct, dispatch, moving

    composites.register()
    autocast.register()
    direct.register()
    dispatch.register()
    moving.register()
    torch.serialization.register_package(0, _is_ours, _refuse_storage)
