"""Which operations ran: a fixture of all tests, and of those that the interpreter runs alone."""

import pytest
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Notes the name of every operation: on a GPU each is a launch or more."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


@pytest.fixture
def operations() -> Operations:
    return Operations()
