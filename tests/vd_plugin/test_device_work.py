"""Steps that prune leave the work to the device: how many operations that takes, and none that would wait for it.

Everything runs on torch's device without memory, in the place of a GPU: `benchmarks/count_ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("vllm")

from benchmarks.count_ops import META, FakeStep, count_layout, count_pruning, image_span, on_meta
from vd_plugin.schedule import DecoderShape

pytestmark = pytest.mark.engine

GROUPED = DecoderShape(32, 4096, 14336, 32, 8, 128)
"""Mistral-7B: four query heads share a key head."""

WAITS = {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "unique_dim", "_unique2", "bincount"}
"""Operations whose result, or its shape, the host must know."""


class DeviceWorkOnly(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
        name = str(func).split(".")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if name in WAITS:
            raise AssertionError(f"{func} waits for the device")
        if name.startswith("index") and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:]):
            raise AssertionError(f"{func} with a mask waits for the device")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise AssertionError(f"{func} without a size waits for the device")
        if name == "_to_copy" and (kwargs or {}).get("device", META) != META:
            raise AssertionError(f"{func} waits for the device")
        result = func(*args, **(kwargs or {}))
        tensors += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(tensor.device != META and tensor.dim() > 0 for tensor in tensors):
            raise AssertionError(f"{func} works on the host, or copies from pageable memory")
        return result


CASES = {
    "one image": (1, (35,), 0, None),
    "eight equal images": (8, (35,), 0, None),
    "text before the image in the cache": (3, (35,), 21, None),
    "two images a request": (2, (35, 600), 0, None),
    "grouped queries": (2, (35, 600), 20, GROUPED),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_prunes_never_waits_for_the_device(name: str) -> None:
    num_reqs, offsets, computed, shape = CASES[name]
    step = FakeStep(num_reqs, tuple(image_span(offset, 320) for offset in offsets), computed)
    mode = DeviceWorkOnly()
    with on_meta():
        layout = step.lay_out(True, mode)
        step.prune(layout, mode, *([shape] if shape else []))


def test_a_decode_step_never_waits_for_the_device() -> None:
    with on_meta():
        FakeStep(256).lay_out(True, DeviceWorkOnly())
        FakeStep(256).lay_out(False, DeviceWorkOnly())


CULPRITS: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda tensor: int(tensor[0]),
    "a list": lambda tensor: tensor.tolist(),
    "places of a mask": lambda tensor: tensor.nonzero(),
    "a mask as index": lambda tensor: tensor[tensor > 0],
    "assignment by a mask": lambda tensor: tensor.index_put_((tensor > 0,), torch.zeros((), device=META)),
    "pageable memory": lambda tensor: torch.arange(3).to(META),
    "pageable index": lambda tensor: tensor[torch.tensor([0, 1])],
    "one-hot": lambda tensor: F.one_hot(tensor),
    "repeats": lambda tensor: tensor.repeat_interleave(tensor),
}


@pytest.mark.parametrize("name", CULPRITS)
def test_the_watch_finds(name: str) -> None:
    tensor = torch.zeros(4, dtype=torch.int64, device=META)
    with pytest.raises(AssertionError, match=r"waits for the device|pageable"), torch.no_grad(), DeviceWorkOnly():
        CULPRITS[name](tensor)


def test_a_decode_step_is_laid_out_by_one_kernel() -> None:
    assert count_layout(256, kernel=True) == 1
    assert count_layout(1, kernel=True) == 1


def test_the_layout_of_a_decode_step_on_a_cpu_is_a_few_operations() -> None:
    assert count_layout(256, kernel=False) <= 13


def test_eight_equal_images_share_their_kernels() -> None:
    """7B shape at 320, three stages. Image by image, they took 1,515."""
    one_layout, one = count_pruning(1, 320)
    eight_layout, eight = count_pruning(8, 320)
    assert one_layout == eight_layout <= 3
    assert one <= 150
    assert eight <= 225


def test_small_images_cost_as_many_operations_as_one() -> None:
    """Weights of all fit into a tile, so not even scores are taken apart: only places of own rows become contiguous."""
    assert count_pruning(8, 48)[1] <= count_pruning(1, 48)[1] + 30
