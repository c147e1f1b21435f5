"""A proxy between the system and a server, and what networks do to connections."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import sys
import threading

# linux/filter.h and asm-generic/socket.h; Python's socket module does not name them.
_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27
_BPF_RETURN = 0x06
_CHUNK_BYTES = 1 << 16

_HOST = "127.0.0.1"


class Proxy:
    """Forwards every connection to a port, until packets vanish (`blackhole`) or it is `cut`."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lost: set[tuple[socket.socket, socket.socket]] = set()
        """Of which no end hears of the other any more."""

        self._is_dark = False
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]

    def blackhole(self) -> None:
        """Let every packet of clients vanish unanswered, of new connections too.

        The kernel drops what a socket's filter refuses before it acknowledges it, so clients see
        what they see of a host that is gone: silence, and no end of the connection. The server has
        found out meanwhile that the clients of the time before are gone, as its keepalive does.
        """
        with self._lock:
            self._is_dark = True
            _drop(self._listener)
            for _, server in self._lost & self._pairs:
                with contextlib.suppress(OSError):
                    server.shutdown(socket.SHUT_RDWR)
            self._lost |= self._pairs
            for client, _ in self._pairs:
                _drop(client)

    def reconnect(self) -> None:
        """Let new connections through; those that are in a black hole stay there for ever."""
        with self._lock:
            self._is_dark = False
            self._listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)

    def cut(self) -> None:
        """Reset every connection, and refuse new ones."""
        self.close()

    def mend(self) -> None:
        """Listen again after a cut."""
        self._listener = self._listen(self.port)

    def close(self) -> None:
        """Refuse new connections, and reset those that there are."""
        # A thread that waits in accept would keep the port open.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            pairs = self._pairs | self._lost
            self._pairs.clear()
        for pair in pairs:
            _reset(pair)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server((_HOST, port), backlog=128)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # closed
            try:
                server = socket.create_connection((_HOST, self._target), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = (client, server)
            with self._lock:
                self._pairs.add(pair)
                if self._is_dark:
                    self._lost.add(pair)
                    _drop(client)
            for source, sink in (pair, pair[::-1]):
                forward = threading.Thread(target=self._forward, args=(source, sink, pair))
                forward.daemon = True
                forward.start()

    def _forward(
        self, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                sink.sendall(data)
        with self._lock:
            known = pair in self._pairs
            self._pairs.discard(pair)
            ends = pair[1:] if pair in self._lost else pair
        if known:
            for end in ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


def _drop(end: socket.socket) -> None:
    """Give a socket a filter of one instruction: return 0, keep nothing of the packet."""
    instruction = ctypes.create_string_buffer(struct.pack("=HBBI", _BPF_RETURN, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(instruction))
    with contextlib.suppress(OSError):  # closed meanwhile
        end.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def _reset(pair: tuple[socket.socket, socket.socket]) -> None:
    for end in pair:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # The other thread that reads keeps the descriptor's file open until it is woken.
            end.shutdown(socket.SHUT_RD)
        end.close()


def missing_filters() -> str:
    """Say whether this system cannot let packets vanish."""
    return "" if sys.platform == "linux" else "socket filters of Linux"
