"""The number of weights is that of the models which transformers builds, less what vLLM leaves out."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import published_configs
import pytest
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from vllm.model_executor.layers.vocab_parallel_embedding import DEFAULT_VOCAB_PADDING_SIZE, pad_vocab_size
from vllm.model_executor.models.utils import get_layer_index

from vd_plugin.model_config import complete
from vd_plugin.weights import count_weights, loaded_tower_layers

MODELS = {"llava_next": LlavaNextForConditionalGeneration, "llava": LlavaForConditionalGeneration}


def with_text(config: dict[str, Any], **text: Any) -> dict[str, Any]:
    return {**config, "text_config": {**config["text_config"], **text}}


CONFIGS: dict[str, dict[str, Any]] = {
    **published_configs.ALL,
    "another head size": with_text(published_configs.MISTRAL_7B, head_dim=96),
    "biases": with_text(published_configs.VICUNA_7B, attention_bias=True, mlp_bias=True),
    "tied": {**with_text(published_configs.QWEN_72B, tie_word_embeddings=True), "tie_word_embeddings": True},
    "no projector bias": {**published_configs.VICUNA_7B, "multimodal_projector_bias": False},
    "another vocabulary": with_text(published_configs.VICUNA_7B, vocab_size=32001),
    "last feature layer": {**published_configs.VICUNA_7B, "vision_feature_layer": -1},
    "feature layer from the front": {**published_configs.VICUNA_7B, "vision_feature_layer": 11},
}


def count_theirs(config: dict[str, Any]) -> int:
    """Of the model on no device, without the tower's layers and norm that vLLM does not build."""
    hf = AutoConfig.for_model(**deepcopy(config))
    with torch.device("meta"):
        model = MODELS[hf.model_type](hf)
    tower = model.model.vision_tower
    layers, norm = tower.encoder.layers, tower.post_layernorm
    unused = [*layers[get_layer_index(hf.vision_feature_layer, len(layers)) :], norm]
    total = sum(parameter.numel() for parameter in model.parameters())
    padding = pad_vocab_size(hf.text_config.vocab_size) - hf.text_config.vocab_size
    matrices = 1 if hf.text_config.tie_word_embeddings else 2
    total += matrices * padding * hf.text_config.hidden_size
    return total - sum(parameter.numel() for module in unused for parameter in module.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_of_the_model(name: str) -> None:
    assert DEFAULT_VOCAB_PADDING_SIZE == 64
    config = CONFIGS[name]
    assert count_weights(complete(config)).total == count_theirs(config)


def test_a_vicuna_of_7b_loads_23_layers_of_its_tower() -> None:
    config = complete(published_configs.VICUNA_7B)
    assert loaded_tower_layers(config) == 23
    weights = count_weights(config)
    assert weights.decoder + weights.vocabulary == 6_738_939_904, "Llama-2-7B with 64 tokens more, twice"


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", published_configs.ALL)
def test_shards_add_up_to_the_model_and_what_is_replicated(name: str, size: int) -> None:
    config = complete(published_configs.ALL[name])
    whole, shard = count_weights(config), count_weights(config, size)
    text, vision = config.text_config, config.vision_config
    layers = loaded_tower_layers(config)
    patches = (vision.image_size // vision.patch_size) ** 2
    replicated_tower = vision.hidden_size * (4 + 3 * vision.patch_size**2 + patches) + layers * 6 * vision.hidden_size
    assert size * shard.tower - whole.tower == (size - 1) * replicated_tower
    newline = text.hidden_size if config.model_type == "llava_next" else 0
    assert size * shard.projector - whole.projector == (size - 1) * (text.hidden_size + newline)
    assert size * shard.decoder - whole.decoder == (size - 1) * text.hidden_size * (2 * text.num_hidden_layers + 1)
    assert size * shard.vocabulary == whole.vocabulary


def test_kv_heads_are_replicated_where_there_are_fewer_than_gpus() -> None:
    few = with_text(published_configs.MISTRAL_7B, num_key_value_heads=2)
    eight = with_text(published_configs.MISTRAL_7B, num_key_value_heads=8)
    assert count_weights(complete(few), 8) == count_weights(complete(eight), 8)


@pytest.mark.parametrize(("size", "sentence"), [(3, "does not divide this model's 16 heads"), (32, "16 heads")])
def test_a_number_of_gpus_that_does_not_fit_is_refused(size: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        count_weights(complete(published_configs.VICUNA_7B), size)
