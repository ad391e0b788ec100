"""Summaries of traces against hand-made events of two steps on a GPU."""

import pytest
from cdpo.engine.basics.phases import PHASES
from step_bench.trace import base_name, summarise

Event = dict[str, object]


def event(category: str, name: str, start: float, duration: float, link: int = 0) -> Event:
    """Times in microseconds, as in a trace; ``link`` ties GPU work to the call that launched it."""
    arguments = {"correlation": link} if link else {}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration} | {
        "args": arguments
    }


def two_steps() -> list[Event]:
    """Steps of 10 ms: policy 2 to 5, backward 5 to 9; the GPU runs 1 ms behind the host."""
    events: list[Event] = [{"ph": "M", "name": "process_name"}]
    for step in range(2):
        at, link = 10_000 * step, 100 * step
        events += [
            event("user_annotation", f"ProfilerStep#{step + 3}", at, 10_000),
            event("user_annotation", "policy", at + 2000, 3000),
            event("user_annotation", "backward", at + 5000, 4000),
            event("user_annotation", "of a library", at + 5100, 10),
            event("cpu_op", "aten::mm", at + 2100, 500),
            event("cuda_runtime", "cudaLaunchKernel", at + 2200, 5, link + 1),
            event("kernel", "void cutlass::gemm<128>(Params)", at + 3200, 1000, link + 1),
            event("cuda_driver", "cuLaunchKernelEx", at + 6000, 5, link + 2),
            event("kernel", "backward_kernel", at + 7000, 3000, link + 2),
            event("cuda_runtime", "cudaMemcpyAsync", at + 9200, 5, link + 3),
            event("cuda_runtime", "cudaStreamSynchronize", at + 9300, 500, link + 4),
            # on a second stream, half of it beside the kernel
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", at + 9500, 1000, link + 3),
        ]
    # before and after the steps
    events += [
        event("cuda_runtime", "cudaDeviceSynchronize", -50, 10, 7),
        event("user_annotation", "policy", 30_000, 500),
        event("cuda_runtime", "cudaLaunchKernel", 30_100, 5, 8),
        event("kernel", "late", 30_200, 100, 8),
    ]
    return events


def test_phases_hold_what_was_launched_in_them():
    trace = summarise(two_steps())
    assert (trace.num_steps, trace.host_ms) == (2, 20)
    assert list(trace.phases) == [*PHASES, "other"]
    policy, backward, other = (trace.phases[name] for name in ("policy", "backward", "other"))
    assert (policy.calls, policy.host_ms, policy.device_ms, policy.waits) == (2, 6, 2, 0)
    assert (backward.calls, backward.host_ms, backward.device_ms, backward.waits) == (2, 8, 6, 0)
    assert (other.calls, other.host_ms, other.device_ms, other.waits) == (0, 6, 2, 2)
    assert trace.phases["data"].host_ms == 0


def test_the_device_as_a_whole():
    trace = summarise(two_steps())
    assert trace.waits == trace.copies_to_host == 2
    assert trace.device_ms == 10
    assert trace.busy_ms == 2 * (1 + 3 + 0.5)  # half of the copy runs beside the kernel
    assert [(n, k.calls, k.device_ms) for n, k in trace.kernels.items()] == [
        ("backward_kernel", 2, 6),
        ("gemm", 2, 2),
    ]


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="holds no step"):
        summarise([event("user_annotation", "policy", 0, 10)])


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("forward_kernel", "forward_kernel"),
        ("void at::native::reduce_kernel<512, 1>(at::Tensor)", "reduce_kernel"),
        ("void at::native::(anonymous namespace)::cat_kernel<float>(int)", "cat_kernel"),
        ("triton_poi_fused_add_0", "triton_poi_fused_add_0"),
        ("sm90_xmma_fprop_implicit_gemm_f32", "sm90_xmma_fprop_implicit_gemm_f32"),
    ],
)
def test_names_as_ncu_matches_them(kernel, name):
    assert base_name(kernel) == name
