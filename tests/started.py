"""Programs in processes of their own, as `python FILE`, `python -m MODULE` and two of them under a launcher.

They are forked from one process that has imported the large libraries, and nothing of this package: what importing them costs, two to six
seconds of a core, is paid once a session. `torchrun.launch` and `subprocess` start the real thing, where the start is what is tested.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).parent
PRELOADED = [
    "torch.distributed.tensor",
    "torch.distributed.nn.functional",
    "torch.distributed.fsdp",
    "accelerate.state",
    "diffusers",
    "diffusers.loaders.peft",
    "diffusers.pipelines.stable_diffusion_3",
    "peft",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "PIL.Image",
    "safetensors.torch",
    "scipy.stats",
    "yaml",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


def _run(arguments: Sequence[str], folder: str, environment: Mapping[str, str], output: Sequence[str]) -> NoReturn:
    """What the interpreter does with its command line, in a forked process."""
    for number, file in enumerate(output, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    program, *rest = arguments
    first = folder if program == "-m" else str(Path(program).parent.absolute())
    sys.path[:0] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    code = 0
    try:
        if program == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _outcome(
    arguments: Sequence[str], folder: Path, environments: Sequence[Mapping[str, str]], limit: float
) -> "subprocess.CompletedProcess[str]":
    with tempfile.TemporaryDirectory() as place:
        output = [str(Path(place) / name) for name in ("out", "err")]
        for file in output:
            Path(file).touch()
        processes = [CONTEXT.Process(target=_run, args=(arguments, str(folder), each, output)) for each in environments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(limit)
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        said = [Path(file).read_text() for file in output]
        if late:
            raise TimeoutError(f"{arguments} ran longer than {limit} s:\n{said[1][-3000:]}")
        code = next((process.exitcode for process in processes if process.exitcode), 0)
    return subprocess.CompletedProcess(list(arguments), code, *said)


def start(
    *arguments: object, folder: Path | None = None, environment: Mapping[str, str] | None = None, limit: float = 240
) -> "subprocess.CompletedProcess[str]":
    """Run `python ARGUMENTS`: a file or "-m" and a module.

    Args:
        arguments: of the interpreter
        folder: where it starts; None takes the present one
        environment: variables beside those of this process
        limit: seconds
    """
    return _outcome(list(map(str, arguments)), folder or Path.cwd(), [{**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}], limit)


def start_two(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a program in two processes that know of each other as under torchrun, with this folder and the package in their path."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environments = [
        {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
        for rank in range(2)
    ]
    return _outcome(list(map(str, arguments)), Path.cwd(), environments, 240)
