"""Who listens on a port."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

import psutil


def port_holder(port: int, host: str = "127.0.0.1") -> str | None:
    """Tell what listens on a port, as "pid 123 (postgres)"; None when the port is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Connections that have just been closed do not count as holders.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return f"nobody, but it cannot be opened: {os.strerror(error.errno or 0)}"
        else:
            return None
    return _listener(port, host)


def _listener(port: int, host: str) -> str:
    unseen = "a process that this user cannot see"
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return unseen
    for connection in connections:
        if connection.status != psutil.CONN_LISTEN or not connection.laddr:
            continue
        address = ipaddress.ip_address(connection.laddr.ip)
        here = address.is_unspecified or str(address) == host
        if here and connection.laddr.port == port and connection.pid:
            return _describe(connection.pid)
    return unseen


def _describe(pid: int) -> str:
    try:
        return f"pid {pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return f"pid {pid}"
