"""System calls: a child may compute, and use the descriptors it was given; the kernel refuses the rest."""

import ctypes
import errno
import os
import platform
import signal
import struct

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2

_LOAD, _EQUALS, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_CLONE_THREAD = 0x00010000
_X32_NUMBERS = 0x40000000

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Numbers on x86_64 and aarch64; -1 where there is no such call.
_ALLOWED = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "close": (3, 57), "lseek": (8, 62), "fstat": (5, 80), "fcntl": (72, 25), "dup": (32, 23),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216),
    "brk": (12, 214), "madvise": (28, 233), "msync": (26, 227), "mincore": (27, 232),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, -1),
    "getpid": (39, 172), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getrusage": (98, 165), "times": (100, 153),
    "sysinfo": (99, 179), "uname": (63, 160), "getrandom": (318, 278),
    "sendto": (44, 206), "recvfrom": (45, 207), "sendmsg": (46, 211), "recvmsg": (47, 212),
    "poll": (7, -1), "ppoll": (271, 73), "select": (23, -1), "pselect6": (270, 72),
    "epoll_wait": (232, -1), "epoll_pwait": (281, 22),
    "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293),
    "membarrier": (324, 283), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
_OWN_PROCESS_ONLY = {"prlimit64": (302, 261), "tgkill": (234, 131)}
_CLONE, _CLONE3 = (56, 220), (435, 435)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that made it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def forbid_all_but_computing() -> bool:
    """Refuse this process, for good, all system calls that open, connect or start anything.

    Memory, threads, clocks and the descriptors that are open already remain. A call that is
    refused fails with EPERM.

    Returns:
        False where the kernel or the machine has no such filters.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        return False
    program = _filter(machine, os.getpid())
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    code = _Program(len(program) // 8, program)
    try:
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(code))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True


def _filter(machine: str, pid: int) -> bytes:
    """The filter as instructions of the kernel's packet filter language."""
    column = list(_ARCHITECTURES).index(machine)
    refuse = _step(_RETURN, _ERRNO | errno.EPERM)
    code = [
        _step(_LOAD, _ARCHITECTURE_AT),
        _step(_EQUALS, _ARCHITECTURES[machine], 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER_AT),
        _step(_AT_LEAST, _X32_NUMBERS, 0, 1),
        refuse,
        # glibc takes this answer for an older kernel and calls clone, whose flags can be seen.
        _step(_EQUALS, _CLONE3[column], 0, 1),
        _step(_RETURN, _ERRNO | errno.ENOSYS),
    ]
    for numbers in _ALLOWED.values():
        if numbers[column] >= 0:
            code += [_step(_EQUALS, numbers[column], 0, 1), _step(_RETURN, _ALLOW)]
    code += _where_first_argument(_CLONE[column], _step(_ANY_BIT, _CLONE_THREAD, 0, 1))
    for numbers in _OWN_PROCESS_ONLY.values():
        code += _where_first_argument(numbers[column], _step(_EQUALS, pid, 0, 1))
    code += _where_first_argument(_OWN_PROCESS_ONLY["prlimit64"][column], _step(_EQUALS, 0, 0, 1))
    return b"".join([*code, refuse])


def _where_first_argument(number: int, test: bytes) -> list[bytes]:
    """Allow a call whose first argument passes a test; else go on, with the number loaded again."""
    return [
        _step(_EQUALS, number, 0, 4),
        _step(_LOAD, _FIRST_ARGUMENT_AT),
        test,
        _step(_RETURN, _ALLOW),
        _step(_LOAD, _NUMBER_AT),
    ]


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _prctl(option: int, *values: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)][:4]
    if libc.prctl(option, *arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
