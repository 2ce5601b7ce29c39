"""What an engine keeps of the demo's images, as JSON: `python -m benchmarks.gpu.kept MODEL OUT [ENGINE OPTIONS]`.

A program of its own, because an engine in this process cannot be followed by another one with other options.
"""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Final

from PIL import Image

from server.demo import make_tasks
from vd_plugin.tools.explain import Explainer

_BUDGETS: Final = (160, 320, 640)


def main(model: str, out: Path, options: list[str]) -> None:
    explainer = Explainer(model, options)
    images = [Image.open(BytesIO(task.png())) for task in make_tasks()]
    explanations = [explainer.explain(image, budget).to_dict() for image in images for budget in _BUDGETS]
    out.write_text(json.dumps(explanations))


if __name__ == "__main__":
    _model, _out, *_options = sys.argv[1:]
    main(_model, Path(_out), _options)
