"""A network between client and server that can be cut, frozen and mended."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress


class Proxy:
    """Forwards connections to a port of its own to a server.

    Args:
        target: host and port of the server.
        host: address of this machine on which it listens.
    """

    def __init__(self, target: tuple[str, int], host: str = "127.0.0.1") -> None:
        self._target = target
        self._host = host
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._until_break: int | None = None
        self._break = self.cut
        self.broken = threading.Event()
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]

    def cut(self) -> None:
        """Close all connections and refuse new ones."""
        with self._lock:
            # Without a shutdown the thread that waits in accept would keep the port open.
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            for end in self._sockets:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            self._sockets.clear()
        self.broken.set()

    def freeze(self) -> None:
        """Keep all connections and forward nothing."""
        self._open.clear()
        self.broken.set()

    def cut_after(self, num_bytes: int) -> None:
        """Cut when so many more bytes have passed; `broken` is set then."""
        self._schedule(num_bytes, self.cut)

    def freeze_after(self, num_bytes: int) -> None:
        """Freeze when so many more bytes have passed; `broken` is set then."""
        self._schedule(num_bytes, self.freeze)

    def mend(self) -> None:
        """Forward everything again."""
        with self._lock:
            self._until_break = None
            if self._listener.fileno() == -1:
                self._listener = self._listen(self.port)
        self.broken.clear()
        self._open.set()

    def _schedule(self, num_bytes: int, action: Callable[[], None]) -> None:
        with self._lock:
            self._until_break, self._break = num_bytes, action

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server((self._host, port))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return
        with self._lock:
            self._sockets |= {client, server}
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 18):
                self._count(len(data))
                self._open.wait()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._sockets.discard(end)

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            if self._until_break is None:
                return
            self._until_break -= num_bytes
            if self._until_break > 0:
                return
            self._until_break = None
        self._break()
