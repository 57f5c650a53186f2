"""Published sizes, checked on the meta device: no memory, no time."""

import pytest
import torch
from torchvision.models import get_model
from transformers import CLIPModel, GPT2LMHeadModel

from genie.workloads import make_workload
from genie.workloads.profiles import PROFILES


@pytest.mark.parametrize(("profile", "count"), [("cpu", 124_439_808), ("gpu", 1_557_611_200)])
@pytest.mark.parametrize("name", ["llm_decode", "llm_prefill"])
def test_gpt2(name, profile, count):
    with torch.device("meta"):
        model = GPT2LMHeadModel(make_workload(name, profile)._lm.config())
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("profile", "count"), [("cpu", 151_277_313), ("gpu", 427_616_513)])
def test_clip(profile, count):
    with torch.device("meta"):
        model = CLIPModel(make_workload("multimodal_vqa", profile).config())
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("profile", "count"), [("smoke", 11_689_512), ("cpu", 25_557_032), ("gpu", 60_192_808)]
)
def test_resnet(profile, count):
    with torch.device("meta"):
        model = get_model(PROFILES[profile].vision_cnn.model)
    assert sum(p.numel() for p in model.parameters()) == count


def test_gpu_profile_is_half_precision_and_channels_last():
    assert make_workload("vision_cnn", "gpu").dtype == torch.float16
    assert PROFILES["gpu"].vision_cnn.channels_last
    workload = make_workload("vision_cnn", "gpu", micro_batches=1, micro_batch=1)
    assert workload.request(0).inputs["images"].dtype == torch.float16


def test_requests_have_the_sizes_of_the_profile():
    ids = make_workload("llm_decode", "gpu", batch=4).request(0).inputs["input_ids"]
    assert ids.shape == (4, 72)
    assert make_workload("llm_prefill", "gpu").request(0).inputs["input_ids"].shape == (8, 512)
    vqa = make_workload("multimodal_vqa", "cpu").request(0).inputs
    assert vqa["pixel_values"].shape == (4, 3, 224, 224)
    assert vqa["input_ids"].shape == vqa["attention_mask"].shape == (12, 32)
    assert make_workload("vision_cnn", "cpu").request(0).inputs["images"].shape == (8, 1, 3, 224, 224)
