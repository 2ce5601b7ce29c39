"""The checkpoints without weights are LLaVA-NeXT-7B, whole or cut in depth, and the plugin takes them."""

from __future__ import annotations

import json
from pathlib import Path

import published_configs
import pytest
from transformers import AutoTokenizer

from benchmarks.bench.checkpoint import SHAPES, write
from benchmarks.bench.engine import _FIRST_TEXT_TOKEN, _LAST_TEXT_TOKEN
from vd_plugin import engine_args
from vd_plugin.model_config import complete
from vd_plugin.options import OPTIONS_KEY, load_config, read_geometry
from vd_plugin.weights import count_weights, loaded_tower_layers

PUBLISHED = complete(published_configs.VICUNA_7B)


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / request.param
    write(path, SHAPES[request.param])
    return path


def config_of(folder: Path) -> object:
    return complete(json.loads((folder / "config.json").read_text()))


def test_widths_are_those_of_the_published_checkpoint(folder: Path) -> None:
    config = config_of(folder)
    for part, cut in (("text_config", {"num_hidden_layers", "vocab_size", "max_position_embeddings"}),
                      ("vision_config", {"num_hidden_layers"})):  # fmt: skip
        theirs, ours = vars(getattr(PUBLISHED, part)), vars(getattr(config, part))
        for name, value in theirs.items():
            if name not in cut:
                assert ours[name] == value, (part, name)


def test_the_whole_has_the_weights_of_the_published_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "whole", SHAPES["7b"])
    assert count_weights(config_of(tmp_path / "whole")).total == count_weights(PUBLISHED).total


def test_a_slice_has_an_eighth_of_everything_a_prompt_goes_through(tmp_path: Path) -> None:
    write(tmp_path / "slice", SHAPES["slice"])
    config = config_of(tmp_path / "slice")
    text = PUBLISHED.text_config
    assert 8 * config.text_config.num_hidden_layers == text.num_hidden_layers
    assert 8 * config.text_config.vocab_size == text.vocab_size
    assert 8 * loaded_tower_layers(config) == PUBLISHED.vision_config.num_hidden_layers
    assert SHAPES["slice"].fraction == 8
    whole, part = (SHAPES[name].boundaries for name in ("7b", "slice"))
    assert tuple(8 * depth for depth in part) == whole


def test_the_plugin_takes_it(folder: Path) -> None:
    boundaries = SHAPES[folder.name].boundaries
    arguments = engine_args(str(folder), visiondrop={"layers": list(boundaries)}, load_format="dummy")
    assert arguments["hf_overrides"]["architectures"] == ["VisionDropLlavaNextForConditionalGeneration"]
    config = load_config(str(folder))
    setattr(config, OPTIONS_KEY, arguments["hf_overrides"][OPTIONS_KEY])
    geometry = read_geometry(config)
    assert geometry.boundaries == boundaries
    assert geometry.full_tokens(672, 672) == 2928


def test_it_has_no_weights_on_disk(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) < 100_000


def test_random_text_has_no_special_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    used = set(range(_FIRST_TEXT_TOKEN, _LAST_TEXT_TOKEN))
    assert not used & set(tokenizer.all_special_ids)
    assert max(used) < len(tokenizer)


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        write(tmp_path, SHAPES["slice"])
