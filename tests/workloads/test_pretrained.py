"""Checkpoints: loaded through the ordinary paths, never replaced by seeded weights."""

import huggingface_hub
import pytest
import torch
from torchvision.models import get_model
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel

from genie.errors import ConfigError
from genie.workloads import make_workload


@pytest.fixture
def checkpoints(tmp_path):
    """One directory with a subdirectory per workload."""
    torch.manual_seed(1)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=96, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=95, eos_token_id=95
        )
    )
    gpt2.save_pretrained(tmp_path / "llm_decode")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 98}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**tower, **special, "vocab_size": 99, "max_position_embeddings": 24},
            vision_config={**tower, "image_size": 32, "patch_size": 16},
            projection_dim=16,
        )
    )
    clip.save_pretrained(tmp_path / "multimodal_vqa")
    (tmp_path / "vision_cnn").mkdir()
    resnet = get_model("resnet18")
    torch.save(resnet.state_dict(), tmp_path / "vision_cnn" / "model.pt")
    return tmp_path, {"llm_decode": gpt2, "multimodal_vqa": clip, "vision_cnn": resnet}


@pytest.mark.parametrize("name", ["llm_decode", "multimodal_vqa", "vision_cnn"])
def test_a_directory_is_loaded_recorded_and_runs(checkpoints, name):
    directory, originals = checkpoints
    workload = make_workload(name, "smoke", weights=directory)
    model = workload.build_model()
    original = originals[name].state_dict()
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.state_dict().items())
    info = workload.model_info(model)
    assert info.weights_source == "pretrained"
    assert info.name == name, "the directory's own name, without its path"
    seeded = make_workload(name, "smoke")
    assert info.weights_sha256 != seeded.model_info(seeded.build_model()).weights_sha256
    request = workload.request(0)
    response = workload.run(model, request, "cpu")
    assert workload.verify(model, request, response, workload.run(model, request, "cpu")).ok


def test_a_missing_directory_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        make_workload("llm_decode", "smoke", weights=tmp_path / "absent")


def test_a_directory_without_the_checkpoint_is_refused(tmp_path):
    for name in ("llm_decode", "multimodal_vqa", "vision_cnn"):
        with pytest.raises(ConfigError, match="cannot load"):
            make_workload(name, "smoke", weights=tmp_path).build_model()


def test_an_incomplete_checkpoint_is_not_topped_up(checkpoints):
    directory, originals = checkpoints
    state = originals["llm_decode"].state_dict()
    del state["transformer.h.0.mlp.c_fc.weight"]
    originals["llm_decode"].save_pretrained(directory / "llm_decode", state_dict=state)
    with pytest.raises(ConfigError, match=r"missing.*c_fc"):
        make_workload("llm_decode", "smoke", weights=directory).build_model()


def test_a_state_dict_of_another_resnet_is_refused(checkpoints):
    directory, _ = checkpoints
    torch.save(get_model("resnet34").state_dict(), directory / "vision_cnn" / "model.pt")
    with pytest.raises(ConfigError, match="resnet18"):
        make_workload("vision_cnn", "smoke", weights=directory).build_model()


def test_without_the_hub_pretrained_weights_are_an_error(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="local directory"):
        make_workload("llm_decode", "cpu", weights="example/absent").build_model()
    with pytest.raises(ConfigError, match="local directory"):
        make_workload("multimodal_vqa", "cpu", weights="example/absent").build_model()


def test_a_model_that_nobody_published_has_no_pretrained_weights():
    with pytest.raises(ConfigError, match="no published checkpoint"):
        make_workload("llm_decode", "smoke", weights="pretrained")
    with pytest.raises(ConfigError, match="no hub of ResNets"):
        make_workload("vision_cnn", "smoke", weights="example/resnet").build_model()
