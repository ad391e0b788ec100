"""What a kernel's machine code costs, told without a GPU: the real launchers, real compilers.

`launches(call)` runs a launcher on meta tensors under a stand-in driver and catches the
specialisations that Triton would compile on a GPU, with their grids; `compiled(launch, sm)`
compiles one and reads the machine code back (`nvdisasm` comes with Triton).
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
WARP = 32


class Launch(NamedTuple):
    """One launch: a kernel, what Triton specialises it for, and the programs it runs."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[Any, Any]
    attrs: dict[Any, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def programs(self) -> int:
        return prod(self.grid)

    @property
    def threads(self) -> int:
        """Of a program."""
        return WARP * int(self.options["num_warps"])


class Run(NamedTuple):
    """What a driver was asked to run."""

    binary: bytes
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    told: tuple[Any, Any, Any]
    """What is told of the launch, whom before it, and whom after it."""


class _StandIn:
    """A driver for which a GPU is there; it notes what it is asked to run, and runs nothing."""

    def __init__(self, sm: int) -> None:
        self._target = GPUTarget("cuda", sm, WARP)
        self.runs: list[Run] = []
        self.utils = self  # of which a driver has some functions

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, binary: bytes, *_: int) -> tuple[int, bytes, int, int, int]:
        """Module, function, registers, spills, threads."""
        return 1, binary, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: ASTSource, metadata: Any) -> Callable[..., None]:
        return self._run

    def _run(self, x: int, y: int, z: int, stream: int, binary: bytes, *others: Any) -> None:
        arguments = others[4:]  # after metadata of the kernel and of the launch, two hooks
        self.runs.append(Run(binary, (x, y, z), arguments, others[1:4]))

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextmanager
def stand_in_driver(sm: int = 90) -> Iterator[list[Run]]:
    """Triton believes that a GPU is there; what it would run on it."""
    before, stand_in = driver._active, _StandIn(sm)
    driver.set_active(stand_in)
    try:
        yield stand_in.runs
    finally:
        driver._active = before


def launches(call: Callable[[], Any], sm: int = 90) -> list[Launch]:
    """What `call` launches; it gets meta tensors and calls launchers, not operators."""
    found: list[Launch] = []
    run, hook = JITFunction.run, triton.knobs.runtime.jit_cache_hook
    caught: dict[str, Any] = {}

    def catch(*, compile: dict[str, Any], **_: Any) -> bool:
        caught.update(compile)
        return True  # it is not compiled here

    def launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        run(self, *args, grid=grid, warmup=warmup, **kwargs)
        options = {name: caught[name] for name in ("num_warps", "enable_fp_fusion")}
        parts = (caught["signature"], caught["constants"], caught["configs"][0], options)
        found.append(Launch(self, *parts, tuple(grid)))

    with stand_in_driver(sm):
        JITFunction.run, triton.knobs.runtime.jit_cache_hook = launch, catch
        try:
            call()
        finally:
            JITFunction.run, triton.knobs.runtime.jit_cache_hook = run, hook
    return found


class MachineCode:
    """SASS of one kernel, and counts of it.

    The main path is what every program runs: up to the first exit, which all but the last program
    of a sample take. Branches on it that go forward count as not taken.
    """

    def __init__(self, cubin: bytes) -> None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [DISASSEMBLER, "-c", file.name]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        self.instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(self.instructions)
            elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                self.instructions.append(found[1])
        self._exit = next(i for i, text in enumerate(self.instructions) if "EXIT" in text)
        jumps = ((i, re.search(r"BRA.*`\((\.L_x_\d+)\)", x)) for i, x in enumerate(self.main_path))
        self.loops = [
            slice(labels[jump[1]], i + 1) for i, jump in jumps if jump and labels[jump[1]] <= i
        ]

    @property
    def main_path(self) -> list[str]:
        return self.instructions[: self._exit + 1]

    @property
    def registers(self) -> int:
        """Of a thread, as the code names them."""
        return 1 + max(int(n) for text in self.instructions for n in re.findall(r"\bR(\d+)", text))

    def thread_instructions(self, trips: int = 1) -> int:
        """That a thread issues on the main path, when its loop is run `trips` times."""
        if len(self.loops) > 1:
            raise ValueError(f"{len(self.loops)} loops before the exit; counted is one at most")
        body = sum(len(self.instructions[loop]) for loop in self.loops)
        return len(self.main_path) + (trips - 1) * body


def opcodes(instructions: list[str]) -> list[str]:
    """Without predicates and operands: `LDG.E.128`."""
    return [re.sub(r"^@\S+\s+", "", text).split()[0] for text in instructions]


def compiled(launch: Launch, sm: int = 90) -> MachineCode:
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attrs)
    target = GPUTarget("cuda", sm, WARP)
    return MachineCode(triton.compile(source, target=target, options=launch.options).asm["cubin"])
