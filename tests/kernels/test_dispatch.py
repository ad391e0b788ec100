"""Which implementation runs, how it is forced, and what happens without Triton."""

import contextlib
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from cdpo.kernels import dispatch, philox_normal, use
from cdpo.kernels.dispatch import HAS_TRITON, INTERPRETED, takes_triton

CPU = torch.zeros(2)
KEYS = torch.zeros(1, 4, dtype=torch.int64)


@pytest.fixture(autouse=True)
def restored_mode(monkeypatch):
    monkeypatch.setattr(dispatch, "_mode", "auto")


def test_auto_on_cpu():
    assert takes_triton(CPU) == INTERPRETED


def test_float64_takes_pytorch():
    assert not takes_triton(CPU.double())
    assert not takes_triton(CPU, CPU.double())


def test_use_for_a_block_and_from_now_on():
    with use("torch"):
        assert not takes_triton(CPU)
        with use("auto"):
            assert dispatch._mode == "auto"
        assert dispatch._mode == "torch"
    assert dispatch._mode == "auto"
    use("torch")
    assert dispatch._mode == "torch"


def test_use_is_undone_by_an_error():
    with pytest.raises(KeyError), use("torch"):
        raise KeyError
    assert dispatch._mode == "auto"


def test_unknown_mode():
    with pytest.raises(ValueError, match="'cuda' is not one of auto, triton, torch"):
        use("cuda")
    assert dispatch._mode == "auto"


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="Triton takes CPU tensors, or is missing")
def test_forced_triton_refuses_cpu_tensors():
    with use("triton"), pytest.raises(RuntimeError, match=r"tensors are on cpu.*TRITON_INTERPRET"):
        philox_normal(KEYS, (3,))


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
def test_forced_triton_refuses_float64():
    with use("triton"), pytest.raises(TypeError, match="float64 is taken by torch only"):
        takes_triton(CPU.double())


def test_without_triton():
    code = """
        import sys
        sys.modules["triton"] = None
        import torch
        from cdpo.kernels import paired_dpo_loss, philox_normal, use
        x = torch.randn(4, 3, requires_grad=True)
        paired_dpo_loss(x, torch.randn(4, 3), torch.randn(2, 3), 1.0).loss.backward()
        assert x.grad is not None
        assert philox_normal(torch.zeros(1, 4, dtype=torch.int64), (5,)).shape == (1, 5)
        try:
            use("triton")
        except RuntimeError as error:
            assert "not installed" in str(error)
        else:
            sys.exit("triton was accepted")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("segments", "default"),
    [
        ([{"address": 0, "total_size": 1 << 62, "segment_pool_id": (0, 0)}], True),
        ([{"address": 0, "total_size": 1 << 62, "segment_pool_id": (0, 3)}], False),
        ([{"address": 0, "total_size": 1 << 62}], True),
        ([{"address": 0, "total_size": 1, "segment_pool_id": (0, 0)}], False),
    ],
    ids=["default pool", "a graph's pool", "a snapshot without pools", "another segment"],
)
def test_memory_of_a_private_pool_is_told_from_the_rest(segments, default, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert dispatch.in_default_pool(torch.zeros(4)) is default


def test_tickets_where_the_allocator_has_no_snapshot(monkeypatch):
    """PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync: the first GroupNorm or loss asked for it."""

    def snapshot():
        raise RuntimeError("cudaMallocAsync does not yet support snapshot")

    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", snapshot)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "zeros", lambda count, dtype, device: zeros(count, dtype=dtype))
    first, second = (dispatch.zero_tickets(3, torch.device("cuda")) for _ in range(2))
    assert len(first) >= 3
    assert not first.any()
    assert first.data_ptr() != second.data_ptr()  # one that might be taken away is not kept


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e39, 1e-25])
def test_scalars_that_float32_cannot_hold(value):
    with pytest.raises(ValueError, match="scale is"):
        dispatch.check_positive(scale=value)
