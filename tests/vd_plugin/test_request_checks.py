"""What ends an engine is refused: images processed elsewhere that do not fit, and parameters vLLM checks too late."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vd_plugin import request_checks
from vd_plugin.request_checks import check_feature, check_sampling
from vd_plugin.schedule import DecoderShape, Geometry

SIDE = 28
GEOMETRY = Geometry(
    rule_version=1,
    tile_size=SIDE,
    patch_size=14,
    grid_pinpoints=((28, 56),),
    boundaries=(1, 2, 3),
    decoder=DecoderShape(4, 8, 16, 2, 2, 4),
)
SPLITS = [[3, 1], [5, 1], [4, 0], [2, 1]]
IDENTIFIER = "image~visiondrop:3.1-5.1-4.0-2.1"


@dataclass
class Feature:
    """As much of vLLM's feature as is read."""

    identifier: str
    data: dict[str, Any] | None
    mm_position: Any


def feature(identifier: str = IDENTIFIER, length: int = 12, **fields: Any) -> Feature:
    values = {
        "visual_token_schedule": torch.tensor(SPLITS),
        "pixel_values": torch.zeros(3, 3, SIDE, SIDE),
        "image_sizes": torch.tensor([28, 56]),
        **fields,
    }
    data = {name: SimpleNamespace(data=value) for name, value in values.items() if value is not None}
    return Feature(identifier, data, SimpleNamespace(offset=0, length=length))


FULL = torch.zeros(4, 2, dtype=torch.int32)
NUM_FULL = GEOMETRY.full_tokens(28, 56)

ACCEPTED = {
    "pruned": feature(),
    "in full": feature("image", NUM_FULL, visual_token_schedule=FULL),
    "in the decoder alone": feature(
        "image~visiondrop:-5.1-4.0-2.1", NUM_FULL, visual_token_schedule=torch.tensor([[0, 0], *SPLITS[1:]])
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_our_processor_makes_is_accepted(name: str) -> None:
    check_feature(ACCEPTED[name], GEOMETRY)


REFUSED = {
    "no data": (Feature(IDENTIFIER, None, SimpleNamespace(offset=0, length=12)), "without its data"),
    "garbage behind the mark": (feature("image~visiondrop:x.y"), "malformed schedule"),
    "nothing behind the mark": (feature("image~visiondrop:"), "another engine"),
    "too few stages": (feature("image~visiondrop:3.1-5.1"), "another engine"),
    "another schedule than the data": (feature("image~visiondrop:3.1-5.1-4.0-2.0"), "not that of its identifier"),
    "a schedule for an image in full": (feature("image", 20), "not that of its identifier"),
    "no schedule": (feature(visual_token_schedule=None), "not that of its identifier"),
    "a schedule that is no tensor": (feature(visual_token_schedule=SPLITS), "not that of its identifier"),
    "fewer placeholders in full": (feature("image", 5, visual_token_schedule=FULL), "placeholders do not fit"),
    "no size": (feature("image", NUM_FULL, visual_token_schedule=FULL, image_sizes=None), "placeholders do not fit"),
    "fewer placeholders": (feature(length=11), "placeholders do not fit"),
    "fewer tiles": (feature(pixel_values=torch.zeros(2, 3, SIDE, SIDE)), "placeholders do not fit"),
    "no pixels": (feature(pixel_values=None), "processed to NoneType"),
    "other pixels": (feature(pixel_values=torch.zeros(3, 3, 14, 14)), "processed to shape"),
    "no numbers": (feature(pixel_values=torch.full((3, 3, SIDE, SIDE), torch.nan)), "pixels between nan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused(name: str) -> None:
    made, says = REFUSED[name]
    with pytest.raises(VLLMValidationError, match=says):
        check_feature(made, GEOMETRY)


def test_a_method_that_is_not_the_known_one_is_not_wrapped() -> None:
    class Other:
        def method(self, something: int) -> None: ...

    with pytest.raises(RuntimeError, match=r"Other\.method is not what VisionDrop was written for"):
        request_checks._wrap(Other, "method", ["self", "prompt"], lambda stock: stock)
    with pytest.raises(RuntimeError, match=r"Other\.gone"):
        request_checks._wrap(Other, "gone", ["self"], lambda stock: stock)


def test_checks_are_put_in_place_once() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    request_checks.install()
    first = InputProcessor.process_inputs
    request_checks.install()
    assert InputProcessor.process_inputs is first


def test_other_models_pass() -> None:
    assert (
        request_checks._geometry(SimpleNamespace(hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]))) is None
    )
    assert request_checks._geometry(SimpleNamespace(hf_config=SimpleNamespace(architectures=None))) is None


def sampling(words: int = 0, **arguments: Any) -> SamplingParams:
    """Parameters as the engine core gets them, with one token that ends every text."""
    params = SamplingParams(**arguments)
    params.update_from_generation_config({}, eos_token_id=2)
    params._bad_words_token_ids = [[1]] * words
    return params


LARGEST = {
    "allowed_token_ids": sampling(allowed_token_ids=[1] * 1024),
    "logit_bias": sampling(logit_bias=dict.fromkeys(range(1024), 1.0)),
    "stop_token_ids": sampling(stop_token_ids=list(range(3, 130)), min_tokens=1),
    "many stop ids, none forbidden": sampling(stop_token_ids=list(range(3, 500))),
    "bad_words": sampling(words=1024),
    "seed": sampling(seed=2**63 - 3, n=3),
    "no seed": sampling(n=3),
}

TOO_LARGE = {
    "allowed_token_ids": sampling(allowed_token_ids=[1] * 1025),
    "logit_bias": sampling(logit_bias=dict.fromkeys(range(1025), 1.0)),
    "stop_token_ids": sampling(stop_token_ids=list(range(3, 131)), min_tokens=1),
    "bad_words": sampling(words=1025),
    "seed": sampling(seed=2**63 - 2, n=3),
}


@pytest.mark.parametrize("params", LARGEST.values(), ids=LARGEST)
def test_what_the_worker_takes_is_accepted(params: SamplingParams) -> None:
    check_sampling(params)


@pytest.mark.parametrize(("name", "params"), TOO_LARGE.items(), ids=TOO_LARGE)
def test_what_would_end_the_worker_is_refused(name: str, params: SamplingParams) -> None:
    with pytest.raises(VLLMValidationError, match="at most") as caught:
        check_sampling(params)
    assert caught.value.parameter == name


def test_the_limits_are_those_of_the_worker() -> None:
    """Read, not imported: modules of kernels must not be imported before vLLM's CPU worker has mended them."""
    import re
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("vllm.v1.worker.gpu.sample")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "logit_bias.py").read_text()
    found = dict(re.findall(r"^MAX_NUM_(\w+) = (\d+)$", source, re.MULTILINE))
    assert found == {
        "ALLOWED_TOKEN_IDS": str(request_checks.MAX_ALLOWED_TOKEN_IDS),
        "LOGIT_BIAS_TOKENS": str(request_checks.MAX_LOGIT_BIAS_TOKENS),
        "STOP_TOKEN_IDS": str(request_checks.MAX_STOP_TOKEN_IDS),
    }
