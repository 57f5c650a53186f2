"""Registers device ``genie`` with PyTorch (PrivateUse1, in pure Python) and its module ``torch.genie``."""

from __future__ import annotations

import types

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from genie.frontend import tensor as _tensor


def _module() -> types.ModuleType:
    m = types.ModuleType("torch.genie", "Device functions of the remote device 'genie'.")

    def manual_seed_all(seed: int) -> None:
        from genie.frontend import session

        session.seed_current(seed)

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


def register() -> None:
    """Idempotent. Also makes `Module.to` swap parameters, so that tied weights stay tied."""
    if _tensor._DEVICE:
        return
    _setup_privateuseone_for_python_backend(rename="genie", backend_module=_module())
    torch.__future__.set_swap_module_params_on_conversion(True)
    _tensor._DEVICE.append(torch.device("genie", 0))
    from genie.frontend import composites, direct, dispatch

    composites.register()
    direct.register()
    dispatch.register()
