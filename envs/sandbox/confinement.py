"""How a process gives up its rights for good: Landlock for files, seccomp for system calls, no capabilities.

Standard library only and no threads: this runs in a child of the jail's single-threaded zygote, between fork and the
first line of untrusted code. What is not allowed by name is refused. Landlock does not cover chmod, chown, utime,
signals sent through F_SETOWN, nor `stat`: seccomp refuses all of these but `stat`, so untrusted code can still learn
whether a path exists and how large it is.

Sources: landlock(7), seccomp(2), capabilities(7); system call numbers of asm/unistd_64.h and asm-generic/unistd.h.
"""

import ctypes
import functools
import os
import platform
import struct

MIN_LANDLOCK_ABI = 3
"""Linux 6.2: older ones do not control truncation."""

# One row for each call: its number on x86_64 and on aarch64, - where that machine does not have it.
_ALLOWED = """
access 21 -                  faccessat2 439 439           mprotect 10 226              rt_sigaction 13 134
epoll_wait 232 -             getuid 102 174               rename 82 -                  unlinkat 263 35
getrlimit 97 163             pwritev 296 70               time 201 -                   getcwd 79 17
ppoll 271 73                 sigaltstack 131 132          dup2 33 -                    getgid 104 176
sched_getaffinity 204 123    clock_nanosleep 230 115      fstat 5 80                   openat 257 56
arch_prctl 158 -             fadvise64 221 223            mremap 25 216                rt_sigpending 127 136
eventfd2 290 19              lseek 8 62                   renameat 264 38              write 1 64
getrusage 98 165             read 0 63                    times 100 153                getdents64 217 61
pread64 17 67                stat 4 -                     dup3 292 24                  getgroups 115 158
sched_yield 24 124           close 3 57                   fstatfs 138 44               pipe 22 -
brk 12 214                   fallocate 285 47             munmap 11 215                rt_sigprocmask 14 135
exit 60 93                   lstat 6 -                    renameat2 316 276            writev 20 66
getsid 124 156               readlink 89 -                umask 95 166                 getegid 108 177
preadv 295 69                statfs 137 43                epoll_create1 291 20         getpgid 121 155
select 23 -                  close_range 436 436          fsync 74 82                  pipe2 293 59
chdir 80 49                  fchdir 81 50                 nanosleep 35 101             rt_sigreturn 15 139
exit_group 231 94            madvise 28 233               restart_syscall 219 128      geteuid 107 175
gettid 186 178               readlinkat 267 78            uname 63 160                 getpgrp 111 -
pselect6 270 72              statx 332 291                epoll_ctl 233 21             poll 7 -
set_robust_list 273 99       creat 85 -                   ftruncate 77 46              rt_sigtimedwait 128 137
clock_getres 229 114         fdatasync 75 83              newfstatat 262 79            getpid 39 172
faccessat 269 48             mmap 9 222                   rseq 334 293                 getppid 110 173
gettimeofday 96 169          readv 19 65                  unlink 87 -                  getrandom 318 278
pwrite64 18 68               sysinfo 99 179               epoll_pwait 281 22
set_tid_address 218 96       dup 32 23                    futex 202 98
clock_gettime 228 113        flock 73 32                  open 2 -
"""
_BY_ARGUMENT = {
    "x86_64": {"ioctl": 16, "fcntl": 72, "prlimit64": 302},
    "aarch64": {"ioctl": 29, "fcntl": 25, "prlimit64": 261},
}
_CLONE3 = 435
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446

_IOCTLS = (0x5401, 0x5450, 0x5451, 0x541B)
"""TCGETS (isatty), FIONCLEX, FIOCLEX, FIONREAD."""
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
"""Duplicate, flags, locks. Not F_SETOWN and F_SETSIG: they make the kernel send any signal to any process."""

_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_OFFSET_NUMBER, _OFFSET_ARCH, _OFFSET_ARGS = 0, 4, 16

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_OWN_FOLDER = _READ_FILE | _READ_DIR | 1 << 1 | 1 << 5 | 1 << 8 | 1 << 14
"""Read, write, remove, make and truncate plain files; no folders, links, sockets, pipes or devices."""
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_GET_SECCOMP, _PR_SET_SECCOMP = 1, 38, 21, 22


class Unsupported(RuntimeError):
    """This kernel or machine lacks what confinement needs; the text names it."""


def machine() -> str:
    return platform.machine()


def allowed_calls(arch: str) -> list[int]:
    """Numbers that seccomp lets through whatever their arguments are."""
    words = _ALLOWED.split()
    column = 1 if arch == "x86_64" else 2
    return sorted(int(words[i + column]) for i in range(0, len(words), 3) if words[i + column] != "-")


@functools.cache
def landlock_abi() -> int:
    """0 where the kernel has no Landlock or it is switched off."""
    return max(0, _libc().syscall(_LANDLOCK_CREATE, None, 0, 1))


def missing_features() -> list[str]:
    """What of this system confinement lacks, in words; empty = it can confine."""
    missing = []
    if machine() not in _AUDIT_ARCH:
        missing.append(f"no table of system calls for {machine()}")
    abi = landlock_abi()
    if abi < MIN_LANDLOCK_ABI:
        has = f"Landlock ABI {abi}" if abi else "no Landlock"
        missing.append(f"the kernel has {has}, needed is ABI {MIN_LANDLOCK_ABI} (Linux 6.2)")
    if not has_seccomp():
        missing.append("the kernel has no seccomp filters")
    return missing


@functools.cache
def has_seccomp() -> bool:
    """Asks whether a filter may return an errno; it is 0 for yes."""
    if machine() not in _SECCOMP:
        return False
    action = ctypes.c_uint32(_ERRNO)
    return _libc().syscall(_SECCOMP[machine()], 2, 0, ctypes.byref(action)) == 0


def die_with_parent() -> None:
    _libc().prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)


def forbid_new_privileges() -> None:
    _check(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def drop_capabilities() -> None:
    """From here on root is a user like others: it cannot raise limits, trace or read what it does not own."""
    header = struct.pack("=II", 0x20080522, 0)
    _check(_libc().syscall(_CAPSET[machine()], header, struct.pack("=6I", 0, 0, 0, 0, 0, 0)), "capset")


def restrict_files(readable: list[str], own_folder: str) -> None:
    """Only `readable` files and folders may be read, only plain files in `own_folder` written; needs no privilege.

    Also no TCP (ABI 4), and no abstract sockets and signals to processes outside (ABI 6).
    """
    abi = landlock_abi()
    handled_files = (1 << (16 if abi >= 5 else 15)) - 1
    attributes = struct.pack("=QQQ", handled_files, 3, 3)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = _check(_libc().syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0), "landlock_create_ruleset")
    for path in readable:
        rights = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
        _allow(ruleset, path, rights)
    _allow(ruleset, "/dev/null", _READ_FILE | 1 << 1)
    _allow(ruleset, own_folder, _OWN_FOLDER)
    _check(_libc().syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def restrict_calls() -> None:
    """Every system call that is not allowed fails with EPERM; a call of another architecture kills. For good."""
    program = filter_program(machine())
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _check(_libc().prctl(_PR_SET_SECCOMP, 2, header, 0, 0), "seccomp")


@functools.cache
def filter_program(arch: str) -> bytes:
    """The BPF program, 8 bytes an instruction."""
    special = _BY_ARGUMENT[arch]
    code = [(_LOAD, 0, 0, _OFFSET_ARCH), (_EQUAL, 1, 0, _AUDIT_ARCH[arch]), (_RETURN, 0, 0, _KILL)]
    code.append((_LOAD, 0, 0, _OFFSET_NUMBER))
    for number in allowed_calls(arch):
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    # glibc falls back from clone3 to clone only on ENOSYS
    code += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    for number, values in ((special["ioctl"], _IOCTLS), (special["fcntl"], _FCNTLS)):
        body = [(_LOAD, 0, 0, _OFFSET_ARGS + 8)]
        for value in values:
            body += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
        body.append((_RETURN, 0, 0, _ERRNO | _EPERM))
        code += [(_EQUAL, 0, len(body), number), *body]
    # prlimit64(0, resource, NULL, old): reading one's own limits
    zeros = (_OFFSET_ARGS, _OFFSET_ARGS + 4, _OFFSET_ARGS + 16, _OFFSET_ARGS + 20)
    body = []
    for offset in zeros:
        body += [(_LOAD, 0, 0, offset), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    code += [(_EQUAL, 0, len(body) + 1, special["prlimit64"]), *body, (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _ERRNO | _EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    rule = struct.pack("=Qi", rights, folder)
    _check(_libc().syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
    os.close(folder)


def _check(result: int, what: str) -> int:
    if result < 0:
        raise Unsupported(f"{what} failed: {os.strerror(ctypes.get_errno())}")
    return result
