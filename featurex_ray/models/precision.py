"""What `auto` precision means on some hardware, asked without torch where that can be."""

from pathlib import Path

_CPU_FLAGS = {"amx_bf16", "avx512_bf16"}


def resolve_precision(precision: str, *, gpu: bool) -> str:
    """What a precision means on this machine; to be asked where the extractor runs.

    Args:
        precision: "auto", "fp32", "bf16" or "fp16".
        gpu: Whether a GPU does the work.

    Returns:
        For "auto": "bf16" where the hardware computes in it (CUDA from compute capability 8.0,
        CPUs with AMX or AVX512-BF16), else "fp32". Anything else as it is.
    """
    if precision != "auto":
        return precision
    return "bf16" if (_gpu_has_bf16() if gpu else _cpu_has_bf16()) else "fp32"


def _gpu_has_bf16() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _cpu_has_bf16() -> bool:
    """As the kernel tells; elsewhere than on Linux nobody is asked, and fp32 is right everywhere."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return bool(_CPU_FLAGS & set(flags))
