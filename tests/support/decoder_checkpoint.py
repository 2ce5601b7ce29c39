"""Checkpoints with other decoders: grouped queries, Mistral, Qwen2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch


def with_decoder(random_model: Path, folder: Path, text: dict[str, Any]) -> Path:
    """The random checkpoint with another decoder around its weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(random_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(text)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    kv_heads, width = config["text_config"]["num_key_value_heads"], config["text_config"]["head_dim"]
    for name in list(tensors):
        kind = next((kind for kind in ("q_proj", "k_proj", "v_proj") if f"self_attn.{kind}.weight" in name), None)
        if kind is None or not name.startswith("language_model"):
            continue
        if kind != "q_proj":
            heads = tensors[name].unflatten(0, (-1, width))
            tensors[name] = heads[torch.arange(kv_heads) % len(heads)].roll(1, dims=1).flatten(0, 1).contiguous()
        if text["model_type"] == "qwen2":
            bias = torch.randn(len(tensors[name]), generator=generator) / 2
            tensors[name.replace(".weight", ".bias")] = bias
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
