"""Threads of an actor's libraries: decided here, from the CPUs that Ray gave the actor, and nowhere else.

Left to themselves, torch, OpenMP and Arrow each start a thread for every CPU of the machine, in every actor.
Decoders and Pillow work in a child of one thread (`contained`), as many of them as there are decode actors.
"""

import pyarrow as pa

IO_THREADS = 2
"""Of Arrow, for reads that wait for a disk or a store."""


def threads_of(num_cpus: float) -> int:
    """Compute threads of an actor that reserves so many CPUs; a share of a CPU is one thread."""
    return max(round(num_cpus), 1)


def limit_threads(num_threads: int, *, with_torch: bool = False) -> None:
    """Keep this process to so many compute threads.

    Args:
        num_threads: Of each library, as they work one after the other.
        with_torch: Also torch's, which is loaded for that.
    """
    pa.set_cpu_count(num_threads)
    pa.set_io_thread_count(IO_THREADS)
    if with_torch:
        import torch

        torch.set_num_threads(num_threads)
