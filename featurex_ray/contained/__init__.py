"""Work on bytes from strangers, in a child process that can do nothing but compute.

A template process, started once and clean (no secrets in its environment, no Ray, no torch but
where its handler needs it), imports what the work needs and then forks children on request in a
few milliseconds. A child has limits on memory, CPU seconds, files and core size; the kernel lets
it neither open a file nor a socket nor start a process; bytes come to it in shared memory or as
descriptors, and results go back in shared memory and as JSON, all of it checked by the parent,
which also keeps the clock.

`multiprocessing`'s own forkserver is not used: it imports the parent's `__main__`, which in a Ray
worker is Ray, and its results are pickles, which a child that was taken over could forge.
"""

from featurex_ray.contained.limits import ProcessLimits
from featurex_ray.contained.process import ChildLostError, ContainedProcess

__all__ = ["ChildLostError", "ContainedProcess", "ProcessLimits"]
