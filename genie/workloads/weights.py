"""Where a model's weights come from: seeded initialisation, or a checkpoint that the user names.

Neither ever stands in for the other: a checkpoint that is absent or incomplete is a ConfigError.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from genie.errors import ConfigError
from genie.workloads import seeding
from genie.workloads.protocol import ModelInfo

#: weight of the last batch norm of a residual block. Each block adds its square to the variance of
#: the trunk: 50 blocks (ResNet-152) grow it 20-fold, well inside fp16; at 1 it would be 2^50.
_RESIDUAL_BN_WEIGHT = 0.25
#: queries and keys are drawn this much larger than the variance-preserving scale. At 1, random
#: attention is a plain average over the context: it is the same at every step, so decoding repeats one
#: token and would hardly notice a corrupted KV cache. At 1.75 it singles out a few positions.
_QUERY_KEY_GAIN = 1.75
#: small against the blocks' outputs, so that a tied GPT-2 does not predict its own input for ever
_EMBEDDING_STD = 0.05


@dataclass(frozen=True)
class Checkpoint:
    """``location`` is a directory, or a name that the model's hub knows."""

    location: str
    is_directory: bool

    @property
    def label(self) -> str:
        """What results record: the directory's own name or the hub name, never a path."""
        return Path(self.location).name if self.is_directory else self.location


def resolve(weights: str, workload: str, published: str) -> Checkpoint | None:
    """None for seeded weights. ``published`` is the profile's own checkpoint, "" if it has none.

    A directory may hold one checkpoint, or one subdirectory per workload name.
    """
    if weights == "seeded":
        return None
    if weights == "pretrained":
        if not published:
            raise ConfigError(
                f"{workload}: this profile's model has no published checkpoint; use seeded weights, "
                "another profile, or name a directory"
            )
        return Checkpoint(published, is_directory=False)
    path = Path(weights).expanduser()
    if path.is_dir():
        own = path / workload
        return Checkpoint(str((own if own.is_dir() else path).resolve()), is_directory=True)
    if path.is_absolute() or weights.startswith((".", "~")) or weights.count("/") > 1 or not weights:
        raise ConfigError(
            f"{workload}: weights directory {weights!r} does not exist; name an existing directory, "
            "'seeded' or 'pretrained'"
        )
    return Checkpoint(weights, is_directory=False)


def load_transformers(model_class: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """``model_class.from_pretrained`` with its silences made errors (missing or misshapen weights)."""
    with _checkpoint_errors(checkpoint):
        model, info = model_class.from_pretrained(
            checkpoint.location,
            dtype=dtype,
            local_files_only=checkpoint.is_directory,
            output_loading_info=True,
        )
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise ConfigError(
            f"checkpoint {checkpoint.location!r} does not fit {type(model).__name__}: {len(absent)} "
            f"weights are missing or have another shape, e.g. {absent[0]}; use a matching checkpoint"
        )
    return freeze(model)


@lru_cache(maxsize=16)
def load_config(config_class: Any, checkpoint: Checkpoint) -> Any:
    """The checkpoint's configuration, read once per process."""
    with _checkpoint_errors(checkpoint):
        return config_class.from_pretrained(checkpoint.location, local_files_only=checkpoint.is_directory)


@contextmanager
def _checkpoint_errors(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        remedy = (
            "the directory must be one that save_pretrained() wrote"
            if checkpoint.is_directory
            else "check the name and that this machine reaches the hub, or name a local directory"
        )
        raise ConfigError(f"cannot load checkpoint {checkpoint.location!r}: {error}; {remedy}") from error


class _SkipRandomFill(TorchFunctionMode):
    """Constructors draw random weights that ``seeded`` would overwrite: for 1.5 billion, minutes."""

    _FILLS = frozenset(("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._FILLS:  # of torch.nn.init, or of torch.Tensor
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def seeded(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """Builds on CPU in ``dtype`` and fills every parameter from a generator seeded by its name.

    Bitwise the same on every machine. Buffers keep what their constructor computed; tied parameters
    are filled once and stay tied.
    """
    with _default_dtype(dtype), _SkipRandomFill():
        model = build()
    jobs = []
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            jobs.append((f"{prefix}.{leaf}", parameter, _initial(module, leaf, parameter)))
    # A tied parameter takes the rule of its first owner: the embedding, not GPT-2's output layer.
    unique = {id(parameter): (name, parameter, rule) for name, parameter, rule in reversed(jobs)}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(_fill, unique.values()))
    _rescale(model)
    return freeze(model)


def _initial(module: nn.Module, leaf: str, parameter: nn.Parameter) -> float | str:
    """The standard deviation to draw, or "zeros", "ones", "keep"."""
    if parameter.dim() == 0:
        return "keep"  # CLIP's logit scale, a published constant
    if leaf == "bias":
        return "zeros"
    if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        return "ones"
    if isinstance(module, nn.Conv2d):
        return math.sqrt(2.0 / parameter[0].numel())  # He et al. 2015: keeps the variance through ReLU
    if isinstance(module, nn.Linear):
        return 1.0 / math.sqrt(parameter.shape[1])
    if type(module).__name__ == "Conv1D":  # transformers' transposed Linear: (in, out)
        return 1.0 / math.sqrt(parameter.shape[0])
    return _EMBEDDING_STD


def _fill(job: tuple[str, nn.Parameter, float | str]) -> None:
    name, parameter, rule = job
    with torch.no_grad():
        if rule == "zeros":
            parameter.zero_()
        elif rule == "ones":
            parameter.fill_(1.0)
        elif isinstance(rule, float):
            seeding.fill_uniform(parameter, rule, seeding.generator("weights", name))


@torch.no_grad()
def _rescale(model: nn.Module) -> None:
    """Damps and centres CNNs, sharpens attention: else outputs overflow or hardly depend on inputs."""
    for module in model.modules():
        match type(module).__name__:
            case "ResNet":
                for layer in module.modules():
                    if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight.shape[1] % 2 == 0:
                        # Filters that sum to zero: what ReLU leaves has a positive mean, and 50
                        # layers of it would drown the image (two images' logits then differ by 4 to 7 %).
                        half = layer.weight.shape[1] // 2
                        layer.weight[:, half:] = -layer.weight[:, :half]
            case "BasicBlock":
                module.bn2.weight.fill_(_RESIDUAL_BN_WEIGHT)  # type: ignore[union-attr, operator]
            case "Bottleneck":
                module.bn3.weight.fill_(_RESIDUAL_BN_WEIGHT)  # type: ignore[union-attr, operator]
            case "GPT2Attention":  # columns: query, key, value
                weight: Any = module.c_attn.weight  # type: ignore[union-attr]
                weight[:, : 2 * weight.shape[1] // 3].mul_(_QUERY_KEY_GAIN)
            case "CLIPAttention":
                for projection in (module.q_proj, module.k_proj):
                    projection.weight.mul_(_QUERY_KEY_GAIN)  # type: ignore[union-attr, operator]


def freeze(model: nn.Module) -> nn.Module:
    """Inference only: eval mode, no gradients."""
    return model.eval().requires_grad_(False)


def sha256(model: nn.Module) -> str:
    """Hash over names, shapes, dtypes and raw bytes of parameters and persistent buffers.

    Call it on the CPU model: tensors elsewhere are copied here first.
    """

    def tensor_hash(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        state = hashlib.sha256(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        # Logical order: a channels-last model has the same weights as a contiguous one.
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return state.digest()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashlib releases the GIL
        digests = list(pool.map(tensor_hash, sorted(model.state_dict().items())))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def model_info(model: nn.Module, name: str, dtype: torch.dtype, checkpoint: Checkpoint | None) -> ModelInfo:
    """``name`` is the profile's model; a checkpoint of the user's own is recorded by its label."""
    return ModelInfo(
        name=name if checkpoint is None else checkpoint.label,
        params=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(dtype).removeprefix("torch."),
        weights_source="seeded" if checkpoint is None else "pretrained",
        weights_sha256=sha256(model),
    )
