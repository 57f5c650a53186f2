"""Cutting a request's batch by hand and joining the answers, as the peers' users do."""

from __future__ import annotations

import torch

from genie.workloads.protocol import Request, Response


def split_inputs(request: Request, parts: int) -> list[Request]:
    """Cuts every input along dimension 0 into the same number of parts, at most ``parts``, none empty."""
    count = min(parts, *(len(tensor) for tensor in request.inputs.values()))
    if parts < 1:
        raise ValueError(f"a request can be split into 1 part or more, not {parts}")
    pieces = {name: tensor.tensor_split(count) for name, tensor in request.inputs.items()}
    return [
        Request(request.index, {name: chunks[k] for name, chunks in pieces.items()}, request.case)
        for k in range(count)
    ]


def joined(responses: list[Response], name: str) -> torch.Tensor:
    """Output ``name`` of all the parts, in order, along dimension 0."""
    return torch.cat([response.outputs[name] for response in responses])


def only(responses: list[Response]) -> Response:
    """The one response of a request that cannot be split."""
    if len(responses) != 1:
        raise ValueError(f"this request is never split, yet {len(responses)} responses came")
    return responses[0]
