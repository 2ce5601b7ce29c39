"""The plugin's options: how they enter an engine (`hf_overrides`), and what a model's configuration means with them.

Options travel inside the model configuration, because that is all that vLLM shows to its multimodal processors.
Imports nothing heavy: `import vd_plugin` happens at the start of every Python process of a CPU environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vd_plugin.schedule import RULE_VERSION, DecoderShape, Geometry, default_boundaries

OPTIONS_KEY: Final = "visiondrop"
"""Where the options stand in `hf_overrides`."""

ARCHITECTURES: Final[Mapping[str, str]] = {
    "llava_next": "VisionDropLlavaNextForConditionalGeneration",
    "llava": "VisionDropLlavaForConditionalGeneration",
}
"""Model type of a checkpoint -> the architecture that serves it."""


def engine_args(model: str, *, visiondrop: Mapping[str, Any] | None = None, **overrides: Any) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM` (or `EngineArgs`) that serve `model` with visual token budgets.

    Args:
        model: folder or model id of a LLaVA-NeXT or LLaVA-1.5 checkpoint.
        visiondrop: options of the plugin; `layers` holds the three depths of the decoder after which images are
            pruned again (by default after a quarter, a half and three quarters of its layers), [] prunes at the
            encoder alone; `compile` says whether the stages are compiled (by default on a GPU, where vLLM compiles);
            `allow_processor_kwargs` names arguments of the image processor that requests may set.
        overrides: any other engine argument; an `hf_overrides` mapping is merged with ours, and its `visiondrop` entry
            stands where the argument of that name is not given.

    Raises:
        ValueError: no such checkpoint, not a LLaVA checkpoint, or an unknown option.
    """
    hf_overrides = overrides.pop("hf_overrides", None) or {}
    if not isinstance(hf_overrides, Mapping):
        raise ValueError("hf_overrides must be a mapping: VisionDrop adds its own keys to it")
    options = dict(visiondrop if visiondrop is not None else hf_overrides.get(OPTIONS_KEY) or {})
    parse_options(options)
    architecture = ARCHITECTURES[_read_model_type(model, overrides)]
    merged = {**hf_overrides, "architectures": [architecture], OPTIONS_KEY: options}
    return {"model": model, **overrides, "hf_overrides": merged}


PROCESSOR_KWARGS: Final = frozenset(
    ("do_convert_rgb", "do_normalize", "do_rescale", "image_mean", "image_std", "resample", "rescale_factor")
)
"""Arguments of the image processor that requests may be allowed to set. Those that change an image's shape are not
among them: the vision tower takes one shape, and making others can take any amount of memory."""


@dataclass(frozen=True, slots=True)
class PluginOptions:
    """The entry `visiondrop` of `hf_overrides`."""

    layers: tuple[int, ...] | None
    """Depths of the decoder after which images are pruned again; None for the default ones."""
    compile: bool | None
    """Whether vLLM may compile the stages of the decoder; None for its default, but not on a machine without a GPU."""
    allow_processor_kwargs: frozenset[str]
    """Arguments of the image processor that a request may set beside ours."""


def parse_options(options: object) -> PluginOptions:
    """Read the plugin's options.

    Raises:
        ValueError: an unknown option, or a value of the wrong form.
    """
    if not isinstance(options, Mapping) or set(options) - {"layers", "compile", "allow_processor_kwargs"}:
        raise ValueError(
            f"the options of {OPTIONS_KEY!r} are {{'layers': [depths], 'compile': true or false, "
            f"'allow_processor_kwargs': [names]}}; got {options!r}"
        )
    layers = options.get("layers")
    if layers is not None and (not isinstance(layers, list | tuple) or any(type(depth) is not int for depth in layers)):
        raise ValueError(f"{OPTIONS_KEY}.layers must be a list of decoder depths; got {layers!r}")
    compiles = options.get("compile")
    if compiles is not None and type(compiles) is not bool:
        raise ValueError(f"{OPTIONS_KEY}.compile must be true or false; got {compiles!r}")
    allowed = options.get("allow_processor_kwargs", [])
    if not isinstance(allowed, list | tuple) or any(name not in PROCESSOR_KWARGS for name in allowed):
        raise ValueError(
            f"{OPTIONS_KEY}.allow_processor_kwargs must be a list, and may hold {', '.join(sorted(PROCESSOR_KWARGS))}; "
            f"got {allowed!r}"
        )
    return PluginOptions(None if layers is None else tuple(layers), compiles, frozenset(allowed))


def read_options(hf_config: Any) -> PluginOptions:
    """The plugin's options of a model, from its Hugging Face configuration.

    Raises:
        ValueError: an option is wrong.
    """
    return parse_options(getattr(hf_config, OPTIONS_KEY, None) or {})


def read_geometry(hf_config: Any) -> Geometry:
    """Geometry of a model from its Hugging Face configuration, our options included.

    Raises:
        ValueError: an option is wrong.
    """
    vision, text = hf_config.vision_config, hf_config.text_config
    layers = read_options(hf_config).layers
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Geometry(
        rule_version=RULE_VERSION,
        tile_size=vision.image_size,
        patch_size=vision.patch_size,
        grid_pinpoints=tuple((h, w) for h, w in getattr(hf_config, "image_grid_pinpoints", None) or ()),
        boundaries=default_boundaries(text.num_hidden_layers) if layers is None else layers,
        decoder=DecoderShape(
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_heads=text.num_attention_heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=head_dim,
        ),
    )


def load_config(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The Hugging Face configuration of a checkpoint, a folder or a model id.

    Raises:
        ValueError: no such checkpoint.
        ImportError: transformers is not installed.
    """
    folder = Path(model)
    looks_local = folder.is_absolute() or model.startswith((".", "~"))
    if looks_local and not folder.is_dir():
        raise ValueError(f"no such model folder: {model}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{model} is not a checkpoint: it holds no config.json")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise ValueError(
            f"cannot read a model configuration from {model!r}, neither as a folder nor as a model id ({reason})"
        ) from error


def _read_model_type(model: str, overrides: Mapping[str, Any]) -> str:
    config = load_config(
        model, revision=overrides.get("revision"), trust_remote_code=overrides.get("trust_remote_code", False)
    )
    model_type = str(config.model_type)
    if model_type not in ARCHITECTURES:
        raise ValueError(f"{model} is a {model_type!r} checkpoint; VisionDrop serves {' and '.join(ARCHITECTURES)}")
    return model_type
