"""`python -m vd_plugin.engine MODEL [vLLM options]`: vLLM's own OpenAI server, set up for visual token budgets.

What it adds to vLLM's server: the architecture that fits the checkpoint, the tool-call parser that fits its chat
template, the geometry route, token details in `usage`, and per-request budgets where only this machine can connect. Bad
input ends with one line, `visiondrop: error: ...`, and exit status 2, which the gateway relays.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from ipaddress import ip_address
from typing import NoReturn

from vd_plugin.flashinfer import find_ninja
from vd_plugin.options import engine_args
from vd_plugin.tool_parsers import choose_parser
from vd_plugin.validation import check_server
from vd_plugin.wire import ERROR_PREFIX

_CPU_MEMORY_SHARE = 0.25
"""Of the free memory, for the KV cache on a machine without a GPU."""


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0].startswith("-"):
        _fail("usage: python -m vd_plugin.engine MODEL [vLLM options]")
    try:
        _serve(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, NotImplementedError) as error:
        _fail(_sentence(error))


def _serve(model: str, options: list[str]) -> None:
    _name_plugins()
    find_ninja()
    engine_args(model)  # an unknown model must not cost the ten seconds that vLLM takes to import

    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if current_platform.is_cpu():
        options = be_modest(options)
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="visiondrop engine"))
    parser.error = lambda message: _fail(f"engine options: {message}")
    args = parser.parse_args(["--model", model, *options])
    check_server(args)
    args.hf_overrides = engine_args(model, hf_overrides=args.hf_overrides)["hf_overrides"]
    args.enable_prompt_tokens_details = True
    choose_parser(args)
    if args.uds is not None:
        _remove_stale_socket(args.uds)
    if _is_private(args):
        args.trust_request_mm_kwargs = True
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    if args.headless:
        # A further node of an engine that spans several: workers, and no HTTP server.
        from vllm.entrypoints.cli.serve import run_headless

        args.api_server_count = 0
        run_headless(args)
    else:
        uvloop.run(run_server(args))


def _remove_stale_socket(path: str) -> None:
    """Remove the socket of an engine that is gone: vLLM leaves it behind, and does not bind where one is."""
    import socket
    from pathlib import Path

    try:
        if not Path(path).is_socket():
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        Path(path).unlink()
    except OSError:
        return  # there is none; or vLLM's own error tells why it cannot be used


def be_modest(options: list[str]) -> list[str]:
    """Options for a machine without a GPU, which has other things to do: vLLM would take nine tenths of its memory.

    Leaves alone what the user has set. Measuring the vision tower's memory, a minute's work here, is left out.
    """
    import psutil

    given = {option.partition("=")[0].replace("_", "-") for option in options}
    sizes = {"--gpu-memory-utilization", "--kv-cache-memory-bytes", "--num-gpu-blocks-override"}
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ and not given & sizes:
        share_gib = psutil.virtual_memory().available * _CPU_MEMORY_SHARE / 2**30
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, int(share_gib)))
    if not given & {"--skip-mm-profiling", "--no-skip-mm-profiling"}:
        options = [*options, "--skip-mm-profiling"]
    return options


def _is_private(args: Namespace) -> bool:
    """Whether only this machine can reach the server; without an address it is made so."""
    if args.uds is None and args.host is None:
        args.host = "127.0.0.1"
    if args.uds is not None or args.host == "localhost":
        return True
    try:
        return ip_address(args.host).is_loopback
    except ValueError:
        return False


def _name_plugins() -> None:
    """vLLM loads a route only if `VLLM_PLUGINS` names it, and then nothing that is not named: name them all."""
    from importlib.metadata import entry_points

    if "VLLM_PLUGINS" in os.environ:
        names = os.environ["VLLM_PLUGINS"].split(",")
    else:
        names = [plugin.name for plugin in entry_points(group="vllm.general_plugins")]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys((*filter(None, names), "visiondrop")))


def _sentence(error: Exception) -> str:
    """What went wrong, without pydantic's frame around it."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return "; ".join(str(detail["msg"]).removeprefix("Value error, ") for detail in error.errors())
    return str(error)


def _fail(sentence: str) -> NoReturn:
    print(f"{ERROR_PREFIX}{' '.join(sentence.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
