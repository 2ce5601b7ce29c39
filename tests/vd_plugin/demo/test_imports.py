"""The demo's scenes and questions need Pillow and nothing else: a gateway has no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import PIL

PROGRAM = """
import pkgutil, sys
before = set(sys.modules)
sys.path[:0] = sys.argv[1:]
import vd_plugin.demo
for module in pkgutil.walk_packages(vd_plugin.demo.__path__, "vd_plugin.demo."):
    __import__(module.name)
from vd_plugin.demo.questions import make_questions
from vd_plugin.demo.scenes import draw, make_scene
scene = make_scene(12, fonts=("Aileron",))
assert make_questions(scene, 12) and draw(scene).size == (448, 448)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""


def test_pillow_and_the_standard_library_are_enough() -> None:
    """-I -S: none of the environment's site hooks, so whatever is loaded was asked for."""
    paths = [str(Path(__file__).parents[3]), str(Path(PIL.__file__).parents[1])]
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["PIL", "vd_plugin"]
