"""``local_compiled``: what a competent user does on the local device before renting a remote one.

A reference row beside the seven. The workload's own program runs unmodified, in this process, on the
device of ``local_pytorch``, between the same two points in time; the model in it is compiled:

    llm_decode       ``generate()`` with a static KV cache, kept from request to request, which is how
                     transformers documents compiled decoding: the step is compiled with CUDA graphs
                     (``mode="reduce-overhead"``), the prefill stays eager
    multimodal_vqa   each tower by ``torch.compile(mode="reduce-overhead")``
    any other        the model by ``torch.compile(mode="reduce-overhead")``

On a GPU a CUDA graph's results lie in memory that its next replay overwrites, so they are copied first.
On a CPU there are no CUDA graphs: the mode is TorchInductor's default, and transformers, which would leave
the decode step eager there, is told to compile it all the same.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from genie.baselines.protocol import Reply, Setup
from genie.devices import DeviceSlot
from genie.errors import ConfigError, MeasurementError, SessionClosedError
from genie.workloads.protocol import Request, Response, Workload

MODE = "reduce-overhead"
#: submodules that a workload calls instead of the model
TOWERS = {"multimodal_vqa": ("vision_model", "text_model")}
#: requests of `prepare`: the first compiles, the second records CUDA graphs, the third replays them
COMPILING = 3
#: they count from here: no other request of a cell has such an index
COMPILE_INDEX = 3_000_000


class LocalCompiled:
    """The workload's own program on ``slot`` with its model compiled; no other process, no bytes.

    Raises ConfigError where TorchInductor has no compiler to call.
    """

    name = "local_compiled"
    remote = False

    def __init__(self, slot: DeviceSlot) -> None:
        require_compiler(slot.type)
        self._slot = slot
        self._workload: Workload | None = None
        self._model: nn.Module | None = None
        self._response: Response | None = None
        self._graphs = 0

    def prepare(self, workload: Workload) -> Setup:
        """Compiles too, by running requests; ``setup_ms["compile"]`` is what they took.

        Raises MeasurementError when nothing was compiled: the row would be ``local_pytorch``.
        """
        self.close()
        start = time.perf_counter()
        model = workload.build_model()
        setup_ms = {"load": (time.perf_counter() - start) * 1e3}
        info = workload.model_info(model)
        device = self._slot.torch_device
        if self._slot.type == "cuda":
            start = time.perf_counter()
            model = model.to(device)
            torch.cuda.synchronize(device)
            setup_ms["upload"] = (time.perf_counter() - start) * 1e3
        self._workload, self._model = workload, compiled(model, workload.name)
        graphs, skips = graphs_compiled(), cuda_graph_skips()
        start = time.perf_counter()
        # Genie's replay turns these guards on for the whole process; nobody else pays for them.
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
            for number in range(COMPILING):
                for case in workload.cases:
                    workload.run(self._model, workload.request(COMPILE_INDEX + number, case), device)
        setup_ms["compile"] = (time.perf_counter() - start) * 1e3
        self._graphs = graphs_compiled()
        if self._graphs == graphs:
            raise MeasurementError(
                f"local_compiled compiled nothing of {workload.name}: its program does not call the model "
                "itself, or Dynamo could not trace it; leave local_compiled out of --genie-baselines here"
            )
        skipped = cuda_graph_skips() - skips
        if skipped and self._slot.type == "cuda":
            warnings.warn(
                f"local_compiled: {skipped} graphs of {workload.name} run compiled, but not as CUDA graphs; "
                "TORCH_LOGS=perf_hints says why",
                stacklevel=2,
            )
        return Setup(setup_ms=setup_ms, model=info, devices=1)

    def run(self, request: Request) -> Response:
        if self._workload is None or self._model is None:
            raise SessionClosedError("local_compiled was asked to run before prepare(), or after close()")
        self._response = self._workload.run(self._model, request, self._slot.torch_device)
        return self._response

    def account(self) -> Reply:
        if self._response is None:
            raise SessionClosedError("local_compiled has no response to account for: call run() first")
        response, self._response = self._response, None
        if (now := graphs_compiled()) != self._graphs:
            warnings.warn(
                f"local_compiled compiled {now - self._graphs} graphs in a request after prepare(): its time "
                "has that in it (TORCH_LOGS=recompiles says why)",
                stacklevel=2,
            )
            self._graphs = now
        return Reply(response=response)

    def close(self) -> None:
        """Frees the model, its compiled code and its CUDA graphs."""
        if self._model is None:
            return
        self._workload = self._model = self._response = None
        torch._dynamo.reset()
        gc.collect()
        if self._slot.type == "cuda":
            torch.cuda.empty_cache()


def require_compiler(device_type: str) -> None:
    """Raises ConfigError, naming what to install, where TorchInductor cannot compile for the device."""
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("torch.compile needs Triton on a GPU: install the triton of this torch")
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cc"]
        what = "a C compiler"
    else:
        names = [os.environ.get("CXX", "g++")]
        what = "a C++ compiler"
    if not any(map(shutil.which, names)):
        variable = "CC" if device_type == "cuda" else "CXX"
        raise ConfigError(
            f"torch.compile needs {what}, and there is no {' or '.join(names)}: install one, or name it in "
            f"${variable}"
        )


def compiled(model: nn.Module, workload: str) -> nn.Module:
    """``model``, which is on its device, made to run compiled where ``workload`` calls it."""
    if workload == "llm_decode":
        model.generate = StaticGenerate(model)  # type: ignore[assignment]
        return model
    for name in TOWERS.get(workload, ()):
        setattr(model, name, Replayed(getattr(model, name)))
    return model if workload in TOWERS else Replayed(model)


class StaticGenerate:
    """``generate()`` of a transformers model with a static cache that outlives the call.

    transformers allocates a static cache anew for each call of ``generate()``. CUDA graphs are recorded for
    addresses, so one that happened to lie elsewhere would have them all recorded again.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import CompileConfig

        self._generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
        self._config: Any = model.config
        self._compile = CompileConfig(mode=MODE)
        if next(model.parameters()).device.type == "cpu":
            self._compile._compile_all_devices = True  # type: ignore[assignment]
        self._caches: dict[tuple[int, int], Any] = {}

    def __call__(self, input_ids: Tensor, **options: Any) -> Tensor:
        from transformers import StaticCache

        batch, prompt = input_ids.shape
        key = (batch, prompt + options["max_new_tokens"])
        if key not in self._caches:
            self._caches[key] = StaticCache(config=self._config, max_cache_len=key[1])
        cache = self._caches[key]
        cache.reset()
        return self._generate(input_ids, past_key_values=cache, compile_config=self._compile, **options)


class Replayed(nn.Module):
    """A compiled module whose results stay what they are when it runs again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._compiled = torch.compile(module, mode=MODE)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return pytree.tree_map_only(Tensor, _kept, self._compiled(*args, **kwargs))


def _kept(result: Tensor) -> Tensor:
    return result.clone() if result.is_cuda else result


def graphs_compiled() -> int:
    """By Dynamo in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def cuda_graph_skips() -> int:
    """Graphs that TorchInductor has compiled so far and does not run as CUDA graphs, though asked to."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])
