"""Two machines on one: network namespaces joined by a cable, with a file system they share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from launching import ROOT

SECONDS = 120


def ip(command: str) -> str:
    """What `ip` prints; raises CalledProcessError."""
    return subprocess.run(
        ["ip", *command.split()], check=True, capture_output=True, text=True
    ).stdout


@dataclass
class Node:
    """A namespace with one end of the cable, which is called ``port`` there."""

    name: str
    address: str
    rank: int
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def torchrun(self, master: Node, *arguments: str) -> subprocess.Popen[str]:
        """Start one rank of two the way the README does, in a process group of its own."""
        launcher = [sys.executable, "-m", "torch.distributed.run"]
        launcher += ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={self.rank}"]
        launcher += [f"--master-addr={master.address}", "--master-port=29500"]
        environment = {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "port",
        }
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *launcher, *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def lose(self) -> None:
        """Cut the cable, then the power: the other node hears nothing, not even an end."""
        ip(f"-n {self.name} link set port down")
        self.switch_off()

    def switch_off(self) -> None:
        """Kill whatever runs there: a launcher's ranks have process groups of their own."""
        for pid in map(int, ip(f"netns pids {self.name}").split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait()

    def plug_in(self) -> None:
        ip(f"-n {self.name} link set lo up")
        ip(f"-n {self.name} link set port up")


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Both nodes, plugged in; raises CalledProcessError where namespaces may not be made."""
    tag = os.getpid()
    nodes = tuple(Node(f"cdpo-{tag}-{rank}", f"10.77.0.{rank + 1}", rank) for rank in range(2))
    made = []
    try:
        for node in nodes:
            ip(f"netns add {node.name}")
            made.append(node)
        first, second = nodes
        ip(f"-n {first.name} link add port type veth peer port netns {second.name}")
        for node in nodes:
            ip(f"-n {node.name} address add {node.address}/24 dev port")
            node.plug_in()
        yield first, second
    finally:
        for node in made:
            node.switch_off()
            ip(f"netns delete {node.name}")
