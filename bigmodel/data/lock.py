"""Exclusive lock on a folder, which the operating system releases when its process ends, however it ends.

A lock is a file: `flock` holds it, its content is {host, machine, pid, token}, and a thread renews its time every few
seconds. The content names the holder in messages, and distinguishes processes of containers with equal host names and ids.
The renewal decides where `flock` cannot: on a file system without it (some NFS), and against another machine, from which
it may be invisible. No clocks are compared: a holder is alive if the file's time changes while it is watched.

This module imports neither torch nor Lightning.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
import weakref
from pathlib import Path
from typing import Any

RENEWAL = 5.0  # seconds between renewals
WATCH = 15.0  # seconds without a renewal after which a holder counts as ended
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


class Held(ValueError):
    """Another process holds the lock.

    Attributes:
        holder: a description of it.
    """

    def __init__(self, path: Path, holder: str) -> None:
        self.holder = holder
        super().__init__(f"{path} is held by {holder}")


class Lock:
    """Lock on a path, held from construction to `release`, or to the end of this process.

    Args:
        path: the lock's file, created if missing; it stays, empty, after a release.

    Raises:
        Held: if another process, or this one, holds it.
        OSError: if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._token = path, secrets.token_hex(8)
        self._released = threading.Event()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._acquire()
        except BaseException:
            os.close(self._file)
            raise
        _held.add(self)
        threading.Thread(target=self._renew, daemon=True, name="lock").start()

    def _acquire(self) -> None:
        before = self._read()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            trusted = True
        except BlockingIOError:
            raise Held(self.path, _describe(before)) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            trusted = False
        before = self._read()  # now that it is locked
        if before and not (trusted and before.get("machine") == _machine()) and self._changes():
            raise Held(self.path, _describe(self._read() or before))
        content = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "token": self._token}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(content).encode(), 0)
        if not trusted:  # of several that found it free, the last one to write has it
            time.sleep(WATCH / 10)
            if (now := self._read()).get("token") != self._token:
                raise Held(self.path, _describe(now))

    def _changes(self) -> bool:
        """True if another process renews the lock while it is watched."""
        first, end = self._state(), time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(min(RENEWAL, WATCH) / 5)
            if self._state() != first:
                return bool(self._read())  # empty: it has been released
        return False

    def _state(self) -> tuple[int, dict[str, Any]]:
        with open(self.path, "rb") as file:  # opened anew, because NFS then asks the server
            return os.fstat(file.fileno()).st_mtime_ns, self._read()

    def _read(self) -> dict[str, Any]:
        """Return the content; empty if the lock is free, or killed while its content was being written."""
        try:
            with open(self.path, "rb") as file:
                content = json.loads(file.read())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL):
            with contextlib.suppress(OSError):  # the folder was removed, or the disk is away for a while
                os.utime(self.path)

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._released.is_set():
            return
        self._released.set()
        _held.discard(self)
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
        os.close(self._file)

    def forget(self) -> None:
        """In a forked process: close the file, so that only the process that has locked it holds it."""
        self._released.set()
        with contextlib.suppress(OSError):
            os.close(self._file)


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget_all)


def _machine() -> str:
    """Return an identifier of the running kernel, equal in all its containers; the host's name where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _describe(content: dict[str, Any]) -> str:
    return f"process {content['pid']} on {content['host']}" if {"pid", "host"} <= content.keys() else "another process"
