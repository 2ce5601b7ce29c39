"""deploy/systemd: units that systemd accepts, whose commands run, and whose examples tell the truth."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_process import wait_for
from images import ask, image
from served import free_port, wait_until_ready
from systemd_unit import Unit, read_example, read_file

from server import cli
from server.settings import Settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "systemd"
GATEWAY, ENGINE = FOLDER / "visiondrop-gateway.service", FOLDER / "visiondrop-engine@.service"
EXAMPLES = (FOLDER / "gateway.env.example", FOLDER / "engine.env.example")
BIN = "/opt/visiondrop/bin"
SPECIFIERS = {"t": "/run", "i": "0", "S": "/var/lib", "C": "/var/cache"}

analyze = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(analyze is None, reason="systemd-analyze is not installed (Debian: systemd)")


def units(folder: Path) -> list[Path]:
    """The units as they are where their programs exist: systemd looks for them."""
    found = []
    for path, name in ((GATEWAY, GATEWAY.name), (ENGINE, ENGINE.name.replace("@", "@0"))):
        text = path.read_text()
        assert f"ExecStart={BIN}/" in text
        found.append(folder / name)
        found[-1].write_text(text.replace(BIN, str(Path(sys.executable).parent)))
    return found


def socket_of(engine: Unit) -> Path:
    command = engine.command(engine.environment())
    return Path(command[command.index("--uds") + 1])


@needs_systemd
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for unit in units(tmp_path):
        said = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True)
        assert (said.returncode, said.stdout + said.stderr) == (0, "")


@needs_systemd
def test_units_are_little_exposed(tmp_path: Path) -> None:
    """systemd's own figure, from 0 (safe) to 10; without any hardening it is 9.2 to 9.6."""
    for unit, bound in zip(units(tmp_path), (15, 22), strict=True):
        command = [analyze, "security", "--offline=true", f"--threshold={bound}", unit]
        said = subprocess.run(command, capture_output=True, text=True)
        assert said.returncode == 0, said.stdout


def test_sysusers_makes_the_user_that_the_units_run_as() -> None:
    kind, name = (FOLDER / "visiondrop.sysusers.conf").read_text().splitlines()[-1].split()[:2]
    assert kind == "u"
    for path in (GATEWAY, ENGINE):
        unit = Unit(path, **SPECIFIERS)
        assert {unit.get("User"), unit.get("Group")} == {name}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_sets_nothing(path: Path) -> None:
    assert read_file(path) == []
    assert len(read_example(path)) >= 5


def test_every_setting_of_the_example_has_its_default() -> None:
    values = {name: value for name, value in read_example(EXAMPLES[0]).items() if name.startswith("VISIONDROP_")}
    assert values.pop("VISIONDROP_ENGINES") == Unit(GATEWAY, **SPECIFIERS).environment()["VISIONDROP_ENGINES"]
    names = {name: name.removeprefix("VISIONDROP_").lower() for name in values}
    assert set(names.values()) <= set(Settings.model_fields)
    assert set(Settings.model_fields) - set(names.values()) == {"engines"}
    assert values.pop("VISIONDROP_IMAGE_THREADS") == "4"  # at most: its default depends on the machine
    given: dict[str, Any] = {names[name]: value for name, value in values.items() if value}
    settings, defaults = Settings(**given), Settings()
    assert {name: getattr(settings, name) for name in names.values()} == {
        name: getattr(defaults, name) for name in names.values()
    }


@pytest.mark.parametrize(("path", "example"), list(zip((GATEWAY, ENGINE), EXAMPLES, strict=True)))
def test_other_variables_of_the_examples_are_those_of_the_unit_with_its_defaults(path: Path, example: Path) -> None:
    ours = Unit(path, **SPECIFIERS).environment()
    told = {name: value for name, value in read_example(example).items() if not name.startswith("VISIONDROP_")}
    libraries = {"HF_TOKEN": "", "HF_HUB_OFFLINE": "0", "CUDA_VISIBLE_DEVICES": ""}
    assert {name: value for name, value in told.items() if name not in libraries} == {
        name: value for name, value in ours.items() if name.startswith(("GATEWAY_", "ENGINE_"))
    }
    assert {name: value for name, value in told.items() if name in libraries} == (libraries if path == ENGINE else {})


def test_gateway_accepts_its_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = Unit(GATEWAY, **SPECIFIERS)
    environment = unit.environment()
    monkeypatch.setenv("VISIONDROP_ENGINES", environment["VISIONDROP_ENGINES"])
    program, *arguments = unit.command(environment)
    assert program == f"{BIN}/visiondrop"
    options = cli._make_parser(with_demo=False).parse_args(arguments)
    assert (options.command, options.host, options.port) == ("gateway", "127.0.0.1", 8000)
    engine = Unit(ENGINE, **SPECIFIERS)
    socket = socket_of(engine)
    assert Settings().engines == (f"unix:{socket}",)
    assert str(socket.parent) == f"/run/{engine.get('RuntimeDirectory')}"


def test_what_is_in_flight_may_end_before_systemd_kills() -> None:
    gateway, engine = Unit(GATEWAY, **SPECIFIERS), Unit(ENGINE, **SPECIFIERS)
    assert int(gateway.get("TimeoutStopSec")) >= Settings().shutdown_seconds + 10
    drain = int(engine.environment()["ENGINE_DRAIN_SECONDS"])
    assert int(engine.get("TimeoutStopSec")) == 2 * drain + 30
    for unit in (gateway, engine):
        assert unit.get("KillMode") == "mixed", "SIGTERM to the server alone, not to vLLM's processes"
        assert unit.get("Restart") == "on-failure"
    assert gateway.get("RestartPreventExitStatus") == "2", "wrong usage"
    # An engine that cannot download its model ends like one that has a wrong option, and tries for ever.
    assert (engine.get("StartLimitIntervalSec"), engine.get("RestartSec")) == ("0", "30")


def test_gateway_runs_as_its_unit_says(tmp_path: Path) -> None:
    """Before two fake engines on the sockets of engine@0 and engine@1, with the example and three lines more."""
    run, port = Path("/tmp") / f"vd-systemd-{os.getpid()}", free_port()  # a socket's path may have 107 bytes
    specifiers = {**SPECIFIERS, "t": str(run)}
    settings = tmp_path / "gateway.env"
    engines = ",".join(f"unix:{run}/visiondrop/engine-{place}/http.sock" for place in range(2))
    settings.write_text(
        EXAMPLES[0].read_text() + f"GATEWAY_PORT={port}\nVISIONDROP_ENGINES={engines}\nVISIONDROP_DEFAULT_BUDGET=low\n"
    )
    unit = Unit(GATEWAY, **specifiers)
    environment = unit.environment(settings)
    program, *arguments = unit.command(environment)
    command = [str(Path(sys.executable).with_name(Path(program).name)), *arguments]
    environment = {name: value for name, value in environment.items() if not name.startswith("GATEWAY_")}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, run, ignore_errors=True)
        for place in range(2):
            engine = Unit(ENGINE, **{**specifiers, "i": str(place)})
            socket = socket_of(engine)
            socket.parent.mkdir(parents=True)
            fake = [sys.executable, str(ROOT / "tests/support/engine_process.py"), "serve", "--uds", str(socket)]
            child = stack.enter_context(
                subprocess.Popen(fake, stdout=subprocess.DEVNULL, env={"PYTHONPATH": str(ROOT)}, start_new_session=True)
            )
            stack.callback(os.killpg, child.pid, signal.SIGKILL)
            wait_for(socket.exists)
        log = tmp_path / "log"
        with log.open("wb") as output:
            gateway = stack.enter_context(
                subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
            )
        stack.callback(gateway.kill)
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/ready", gateway, log)
        answer = httpx.post(f"{url}/v1/chat/completions", json=ask(image(672, 672)), timeout=30)
        assert answer.json()["usage"]["visual_tokens"]["per_image"][0]["budget"] == 160
        wait_for(lambda: len(re.findall(r'engine_up\{engine="\d"\} 1', httpx.get(f"{url}/metrics").text)) == 2)
        began = time.monotonic()
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(timeout=10) == 0
        assert time.monotonic() - began < int(unit.get("TimeoutStopSec"))


@pytest.mark.slow
def test_vllm_knows_every_option_of_the_engine() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    unit = Unit(ENGINE, **SPECIFIERS)
    options = "--gpu-memory-utilization 0.9 --max-model-len 4096 --dtype bfloat16"
    assert options in EXAMPLES[1].read_text()
    program, flag, module, model, *given = unit.command({**unit.environment(), "ENGINE_OPTIONS": options})
    assert (program, flag, module) == (f"{BIN}/python", "-m", "vd_plugin.engine")
    parser = make_arg_parser(FlexibleArgumentParser(exit_on_error=False))
    parsed = parser.parse_args(["--model", model, *given])
    assert (parsed.shutdown_timeout, parsed.max_model_len, parsed.dtype) == (60, 4096, "bfloat16")
    assert parsed.uds == "/run/visiondrop/engine-0/http.sock"
