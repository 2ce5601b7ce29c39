"""The demo model and the images it was trained to answer questions about.

`scenes` draws images, `questions` asks about them, `model/` holds the checkpoint (an ordinary LLaVA-NeXT folder).
Pillow and the standard library only, so that whoever imports this needs no torch.
"""

from pathlib import Path
from typing import Final

MODEL_PATH: Final = Path(__file__).parent / "model"
"""The demo checkpoint, as it is installed with the package."""

MODEL_NAME: Final = "visiondrop-demo"
"""What clients call it."""


def find_model() -> Path:
    """The demo checkpoint's folder.

    Raises:
        FileNotFoundError: its weights are not installed here. The message is a sentence.
    """
    weights = MODEL_PATH / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"the weights of the demo model are not installed here (no {weights}): name a MODEL")
    return MODEL_PATH
