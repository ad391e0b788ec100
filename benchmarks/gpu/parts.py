"""The parts of `bench_gpu.py`: each a command of under ten minutes, with what it leaves behind.

A new part is a row of PARTS. Commands are run in the project's root; `{out}` in them is the folder
of results.
"""

from dataclasses import dataclass

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
MODELS = {
    "sd15": "SD1.5@512",
    "sdxl": "SDXL@1024",
    "lcm": "LCM@768",
    "lcm_image": "LCM-image@768",
    "sd35": "SD3.5-medium@512",
    "flux": "FLUX.1-dev@512",
    "sana": "SANA-1.6B@1024",
}
# What a target changes in an LCM is no kernel's shape, and transformers have no layers of ours.
KERNEL_MODELS = ("sd15", "sdxl", "lcm")
KERNEL_BATCHES = (1, 8, 64)  # pairs; each batch compiles some twenty shapes of layers anew
# Knobs of `bench_step.py` that are parts of their own: by the name of the part what their names
# contain, and the head of their column.
KNOBS = {
    "live": ("live", "latents, text live"),
    "cached": ("frozen passes", "frozen passes kept"),
    "graph": ("CUDA graphs", "CUDA graphs"),
    "compiled": ("compiled", "compiled"),
}
# Stable Diffusion under `speed.rounding: free`, in a process of its own: cuDNN keeps to the
# convolutions that a process has met. An LCM's are those of its base.
ROUNDED = ("sd15", "sdxl")
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all", "--tool")

Command = tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One row of the table."""

    name: str
    command: Command
    """On a GPU; `python` stands for the interpreter that is running."""
    rehearsal: Command
    """The same on a CPU: small shapes, seconds."""
    writes: Command
    """Files in the folder of results; the part is done when the command has left them."""
    minutes: int
    """Expected, not measured; it is ended after ten."""
    interpreted: bool = False
    """Whether the rehearsal runs our kernels in Triton's interpreter."""


def _pytest(name: str, *arguments: str) -> Command:
    options = ("-q", "-p", "no:cacheprovider", f"--junit-xml={{out}}/{name}.xml")
    return ("python", "-m", "pytest", *options, *arguments)


def _kernel_tests(name: str, marked: str) -> Part:
    """On the device; machine code for other generations is no matter of this one."""
    away = "--ignore=tests/kernels/test_machine_code.py"
    return Part(
        name,
        _pytest(name, "-m", marked, away, "tests/kernels"),
        _pytest(name, "-k", "triton and logit", "tests/kernels/test_paired_dpo_loss.py"),
        (f"{name}.xml",),
        9,
        interpreted=True,
    )


def _sanitized(tool: str) -> Part:
    each = ("python", "-m", "gpu.each_kernel", "--out", f"{{out}}/{tool}.json")
    only = ("--kernels", "paired_add_noise")
    return Part(
        tool, (*SANITIZER, tool, *each), (*each, *only), (f"{tool}.json",), 5, interpreted=True
    )


def _kernel_times(model: str, pairs: int) -> Part:
    name = f"kernels_{model}_{pairs}"
    command = ("python", "benchmarks/bench_kernels.py", "--out", f"{{out}}/{name}.json")
    tiny = ("--tiny", "--kernels", "paired_add_noise", "--batches", "2")
    real = ("--models", MODELS[model], "--batches", f"{pairs}")
    return Part(name, (*command, *real), (*command, *tiny), (f"{name}.json",), 7)


def _step(model: str, kind: str, *chosen: str) -> Part:
    name = f"step_{model}{kind and '_'}{kind}"
    command = ("python", "benchmarks/bench_step.py", "--models", MODELS[model])
    command += (*chosen, "--out", f"{{out}}/{name}.json")
    minutes = 9 if kind == "compiled" else 5
    return Part(name, command, (*command, "--tiny", "--pairs", "1"), (f"{name}.json",), minutes)


def _profile() -> Part:
    command = ("python", "-m", "gpu.profile_real_step", "--out", "{out}/profile")
    files = ("profile/trace.json.gz", "profile/profile.txt")
    return Part("profile", command, (*command, "--tiny"), files, 3)


PARTS = (
    _kernel_tests("kernel_tests", "not slow and not long"),
    *(_sanitized(tool) for tool in TOOLS),
    *(_kernel_times(model, pairs) for model in KERNEL_MODELS for pairs in KERNEL_BATCHES),
    *(_step(model, "", "--no-knobs") for model in MODELS),
    _step("flux", "quantised", "--knob", "base in"),  # whose memory matters
    *(_step(model, kind, "--knob", knob) for kind, (knob, _) in KNOBS.items() for model in MODELS),
    *(_step(model, "rounding", "--no-knobs", "--rounding", "free") for model in ROUNDED),
    _profile(),
    _kernel_tests("kernel_tests_long", "long and not slow"),
)
