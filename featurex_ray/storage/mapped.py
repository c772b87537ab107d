"""Files in memory."""

import mmap
import os


class MappedFile(mmap.mmap):
    """A read-only mapping that keeps its file, so that another process can be handed it.

    Attributes:
        descriptor: The file, open as long as the mapping is.
    """

    descriptor: int

    @classmethod
    def of(cls, descriptor: int) -> "MappedFile":
        """Map a file that is open; the descriptor stays the caller's."""
        mapped = cls(descriptor, 0, prot=mmap.PROT_READ)
        mapped.descriptor = os.dup(descriptor)
        return mapped

    def __del__(self) -> None:
        os.close(self.descriptor)
