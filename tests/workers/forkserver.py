"""Runs verbs in forked children of a process that has imported everything once.

A verb spends most of a tiny run importing torch, diffusers and DeepSpeed. This process imports
them, computes nothing (so that no thread is lost in a fork), and listens at the abstract socket
that it is told. For each connection it forks a process that for each JSON line forks the ranks
asked for. A rank runs the real entry script and dies its own death, SIGKILL included. The listener
ends with its stdin, each of the others with its connection.

Request:  {"script": path, "args": [...], "env": {...}, "ranks": n, "seconds": limit}
Reply:    {"codes": [exit code, or minus a signal, of each rank], "output": [text of each rank]}
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import IO, Any

gc.disable()  # until all that stays is there
with contextlib.redirect_stderr(io.StringIO()):
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DIFFUSERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as a verb does before it imports them
    import cdpo.engine.comparing.comparison
    import cdpo.engine.models.latent_diffusion
    import cdpo.engine.models.sd
    import cdpo.engine.models.sdxl
    import cdpo.engine.objectives.diffusion_dpo
    import cdpo.engine.preparing.preparation
    import cdpo.engine.training.trainer  # noqa: F401

    # What a verb would import when it first draws, saves or loads something.
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import pyarrow.dataset  # noqa: F401
    from diffusers import schedulers
    from PIL import Image

    for compatible in vars(schedulers)["_import_structure"].values():
        [getattr(schedulers, name) for name in compatible]
    Image.init()

    # What a rank would do anew at deepspeed.initialize: import this module, for whose decorator
    # all of torch's inductor is imported (half of the time that a tiny run takes), and ask a
    # compiler which of DeepSpeed's ops could be built.
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.muon.original_muon
    import deepspeed.utils.nvtx
    import torch.autograd.function
    from deepspeed.ops import __compatible_ops__  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    # Compiles a thousand patterns for all models there are, at the first that is loaded.
    get_checkpoint_conversion_mapping("clip")

# Under stage 3 each layer runs dozens of DeepSpeed's functions, a fifth of whose time is marks for
# a profiler of GPUs and looking up the signatures of the same eight autograd functions.
deepspeed.utils.nvtx.enable_nvtx = False
torch.autograd.function.inspect = SimpleNamespace(signature=functools.cache(inspect.signature))
# And writes out each parameter for a log that nobody reads.
torch.nn.Parameter.__repr__ = object.__repr__
# Arranging a report's charts takes twice as long as drawing them; tests/engine/comparing/report
# draws them arranged.
matplotlib.figure.Figure.set_layout_engine = lambda *_, **__: None

# A child that collects garbage would walk, and so copy, all that the libraries have made: a quarter
# of a tiny run's time.
gc.freeze()
gc.enable()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(request: dict[str, Any], rank: int, port: int, output: str) -> int:
    """Fork one rank; returns its process id."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(0)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if request["ranks"] > 1:
        world = {"WORLD_SIZE": request["ranks"], "RANK": rank, "LOCAL_RANK": rank}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in world.items()})
    os.environ.update(request["env"])
    sys.argv = [request["script"], *request["args"]]
    sys.path.insert(0, os.path.dirname(request["script"]))  # as python does
    code = 1
    try:
        runpy.run_path(request["script"], run_name="__main__")
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(children: list[int], seconds: float) -> list[int]:
    """Exit codes; like a launcher, ends the other ranks soon after one has failed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if codes[child] != 0:
                        # A rank that failed alone waits a little before it says so itself.
                        grace = 1 if codes[child] < 0 else 6
                        deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def serve(requests: IO[str]) -> None:
    for line in requests:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            port = free_port()
            outputs = [f"{folder}/{rank}" for rank in range(request["ranks"])]
            children = [start(request, rank, port, output) for rank, output in enumerate(outputs)]
            codes = wait(children, request["seconds"])
            texts = []
            for output in outputs:
                with open(output, errors="replace") as file:
                    texts.append(file.read())
        print(json.dumps({"codes": codes, "output": texts}), file=requests, flush=True)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who serve
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{sys.argv[1]}")
    listener.listen()
    print("ready", flush=True)
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection = listener.accept()[0]
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            with connection, connection.makefile("rw") as requests:
                serve(requests)
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    main()
