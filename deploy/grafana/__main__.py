"""Write the dashboards as JSON files, which Grafana loads at its start (provisioning/dashboards).

python -m deploy.grafana            write them
python -m deploy.grafana --check    exit with status 1 if a file differs from what this code makes
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.generated import write_or_check
from deploy.grafana.engine import engine
from deploy.grafana.gateway import gateway
from deploy.grafana.visual_tokens import visual_tokens

FOLDER: Final = Path(__file__).parent / "dashboards"
_DASHBOARDS: Final = {"visual_tokens": visual_tokens, "gateway": gateway, "engine": engine}


def render() -> dict[Path, str]:
    """The files and their contents."""
    return {
        FOLDER / f"{name}.json": JSONEncoder(sort_keys=True, indent=2).encode(make().build()) + "\n"
        for name, make in _DASHBOARDS.items()
    }


def main() -> int:
    files = render()
    strangers = [path for path in FOLDER.glob("*.json") if path not in files]
    return write_or_check(files, sys.argv[1:], "is not what deploy/grafana/*.py makes; run: make dashboards", strangers)


if __name__ == "__main__":
    sys.exit(main())
