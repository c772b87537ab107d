"""Messages over a Unix socket: length, then bytes, and descriptors beside them."""

import array
import socket
import struct
import time
from collections.abc import Sequence

_LENGTH = struct.Struct("=I")
_MOST_BYTES = 4 << 20
"""JSON becomes objects of twenty times its size: a message must not exhaust who reads it."""
_MOST_FILES = 2


class ClosedError(Exception):
    """The other side is gone. Never leaves `contained`."""


def send(
    channel: socket.socket, message: bytes, files: Sequence[int] = (), *, seconds: float | None = None
) -> None:
    """Send one message; descriptors arrive as copies.

    Raises:
        ClosedError: Nobody is there.
        TimeoutError: It was not taken within `seconds`.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    if channel.gettimeout() != seconds:  # a contained process may not change it
        channel.settimeout(seconds)
    try:
        channel.sendmsg([_LENGTH.pack(len(message))], rights)
        channel.sendall(message)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ClosedError("nobody reads any more") from error


def receive(channel: socket.socket, *, seconds: float | None = None) -> bytes:
    """The next message, without descriptors: those that come with it are dropped.

    Raises:
        ClosedError: There is nobody to send one, or what was sent has no possible length.
        TimeoutError: None came whole within `seconds`.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    return _rest(channel, _exactly(channel, _LENGTH.size, deadline), deadline)


def receive_with_files(channel: socket.socket) -> tuple[bytes, list[int]]:
    """The next message and its descriptors. Raises as `receive` does."""
    length, files, _, _ = socket.recv_fds(channel, _LENGTH.size, _MOST_FILES)
    if len(length) < _LENGTH.size:
        length += _exactly(channel, _LENGTH.size - len(length), None)
    return _rest(channel, length, None), files


def _rest(channel: socket.socket, length: bytes, deadline: float | None) -> bytes:
    (num_bytes,) = _LENGTH.unpack(length)
    if num_bytes > _MOST_BYTES:
        raise ClosedError(f"a message of {num_bytes:,} bytes")
    return _exactly(channel, num_bytes, deadline)


def _exactly(channel: socket.socket, num_bytes: int, deadline: float | None) -> bytes:
    parts, missing = [], num_bytes
    while missing:
        if deadline is not None:
            channel.settimeout(max(deadline - time.monotonic(), 1e-6))
        try:
            part = channel.recv(min(missing, 1 << 20))
        except ConnectionResetError:
            part = b""
        if not part:
            raise ClosedError("the other side ended")
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
