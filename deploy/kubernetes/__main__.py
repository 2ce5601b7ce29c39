"""Write Prometheus' rules as objects of the Prometheus Operator, which kustomize cannot do.

python -m deploy.kubernetes            write monitoring/prometheus_rules.yaml
python -m deploy.kubernetes --check    exit with status 1 if the file differs from what this code makes
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from deploy.generated import write_or_check

_RULES: Final = Path(__file__).parents[1] / "prometheus" / "rules"
_OUTPUT: Final = Path(__file__).parent / "monitoring" / "prometheus_rules.yaml"

_NOTE: Final = """\
# Written by `python -m deploy.kubernetes` from deploy/prometheus/rules; change the rules there.
"""
_OBJECT: Final = """\
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: visiondrop-{name}
spec:
  groups:
"""


def render() -> dict[Path, str]:
    """The file and its contents: an object for each file of rules, whose text is indented and otherwise unchanged.

    Raises:
        ValueError: a file of rules has something else than comments before its groups.
    """
    objects = [_OBJECT.format(name=path.stem) + _groups(path) for path in sorted(_RULES.glob("*.yml"))]
    return {_OUTPUT: _NOTE + "---\n".join(objects)}


def _groups(path: Path) -> str:
    head, found, groups = path.read_text().partition("\ngroups:\n")
    if not found or any(line and not line.startswith("#") for line in head.splitlines()):
        raise ValueError(f"{path} must have comments, then `groups:` and nothing else at the left margin")
    return "".join("  " + line if line.strip() else line for line in groups.splitlines(keepends=True))


def main() -> int:
    advice = "is not what deploy/prometheus/rules makes; run: python -m deploy.kubernetes"
    return write_or_check(render(), sys.argv[1:], advice)


if __name__ == "__main__":
    sys.exit(main())
