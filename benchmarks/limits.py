"""Limits of this process, which the systems that it starts inherit."""

import resource


def raise_open_files() -> None:
    """Let as many files be open as the machine allows: each waiting client is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
