"""The cage: what a runner takes away from itself before it touches the artifact.

Layers, in the order in which they are applied; each one reports whether it is active:

===================  ====================================================================================
``death_signal``     killed by the kernel when the supervisor dies (``PR_SET_PDEATHSIG``)
``limits``           CPU time, memory, file size, open files, no core files (``setrlimit``)
``capabilities``     no capability left, also for root (``capset``)
``no_new_privileges``  set-user-id programs gain nothing (``PR_SET_NO_NEW_PRIVS``)
``landlock``         files: read only what a Python environment needs, write only in the scratch directory
``seccomp``          system calls: no socket can be made or connected, no process or program started,
                     no other process traced or signalled, nothing mounted
===================  ====================================================================================

Standard library only, Python 3.9 syntax. On a system without a layer the layer is reported as inactive; whoever
starts the runner says which layers are required.

References
----------
Linux ``Documentation/userspace-api/seccomp_filter.rst`` and ``landlock.rst``; the deny list follows the default
profile of containerd (``contrib/seccomp/seccomp_default.go``), reversed: libraries of models use system calls that
no list of ours could foresee, so what is not known to be harmful is allowed.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

LINUX_LAYERS = ("death_signal", "limits", "capabilities", "no_new_privileges", "landlock", "seccomp")

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2


class CageError(Exception):
    """A required layer of the cage could not be applied."""


@dataclass(frozen=True)
class CageSpec:
    """What a runner may use. Sizes are bytes; ``None`` means no limit.

    Attributes
    ----------
    memory_bytes
        Private writable memory (``RLIMIT_DATA``): what a model allocates, without mapped libraries.
    cpu_s
        CPU time in seconds over the runner's whole life; then the kernel kills it.
    file_size_bytes
        Largest file it may write.
    probe_s
        Longest time the model may take for the made-up rows that its signature is found with, in seconds.
    open_files
        Open file descriptors.
    required
        Layers without which the runner refuses to start.
    layers
        Layers to apply at all.
    """

    memory_bytes: int | None = None
    cpu_s: int | None = None
    file_size_bytes: int | None = None
    probe_s: float = 10.0
    open_files: int | None = 256
    required: tuple[str, ...] = ()
    layers: tuple[str, ...] = LINUX_LAYERS

    def to_json(self) -> str:
        """Return the form that the runner's ``--cage`` argument takes."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> CageSpec:
        values = json.loads(text)
        for name in ("required", "layers"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)


def platform_layers() -> tuple[str, ...]:
    """Return the layers this operating system could have; a kernel may still lack one."""
    return LINUX_LAYERS if sys.platform == "linux" else ("limits",)


REQUIRED_LAYERS = tuple(layer for layer in ("death_signal", "limits", "no_new_privileges", "seccomp") if layer in platform_layers())
"""Without these no model is loaded, neither to try it nor to serve it. Landlock is applied where the kernel has it."""


@dataclass
class CageReport:
    """Which layers are active, and why the others are not."""

    layers: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, str]:
        return dict(self.layers)


def apply(spec: CageSpec, *, environment: str, artifact: Sequence[str], scratch: str | None) -> CageReport:
    """Apply the layers to this process, for good, and report each as ``active`` or with the reason why not.

    ``artifact`` are the files and folders of the model.

    Call it from the main thread before any other thread starts: Landlock and seccomp bind the calling thread and
    the threads that it makes later.

    Raises
    ------
    CageError
        A required layer could not be applied.
    """
    steps: dict[str, Callable[[], None]] = {
        "death_signal": _die_with_parent,
        "limits": lambda: _limit(spec),
        "capabilities": _drop_capabilities,
        "no_new_privileges": lambda: _prctl(_PR_SET_NO_NEW_PRIVS, 1),
        "landlock": lambda: _restrict_files(readable_paths(environment, artifact), scratch),
        "seccomp": _filter_system_calls,
    }
    report = CageReport()
    for name, step in steps.items():
        report.layers[name] = _apply_layer(step) if name in spec.layers else "not requested"
    for name in spec.required:
        reason = report.layers.get(name, "unknown layer")
        if reason != "active":
            raise CageError(f"the sandbox layer '{name}' is required but is not active: {reason}")
    return report


def _apply_layer(step: Callable[[], None]) -> str:
    try:
        step()
    except (OSError, AttributeError, ValueError) as error:
        return str(error) or type(error).__name__
    return "active"


_libc: list[ctypes.CDLL] = []


def _c() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "needs Linux")
    if not _libc:
        _libc.append(ctypes.CDLL(None, use_errno=True))
    return _libc[0]


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int, pointer: ctypes.c_void_p | None = None) -> None:
    unused = ctypes.c_ulong(0)
    third = pointer if pointer is not None else unused
    _check(_c().prctl(option, ctypes.c_ulong(value), third, unused, unused), "prctl")


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(spec: CageSpec) -> None:
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_DATA, spec.memory_bytes)
    _lower(resource.RLIMIT_CPU, spec.cpu_s)
    _lower(resource.RLIMIT_FSIZE, spec.file_size_bytes)
    _lower(resource.RLIMIT_NOFILE, spec.open_files)
    if sys.platform == "darwin":
        # Elsewhere the limit counts every process and thread of the user, not ours; there seccomp forbids new ones.
        _lower(resource.RLIMIT_NPROC, 0)


def _lower(which: int, value: int | None) -> None:
    """Set a limit; never above the hard limit in force."""
    if value is None:
        return
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _drop_capabilities() -> None:
    version_3 = 0x20080522
    header = (ctypes.c_uint32 * 2)(version_3, 0)
    data = (ctypes.c_uint32 * 6)()
    _check(_c().capset(header, data), "capset")


# Landlock -----------------------------------------------------------------------------------------------------

_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_DIR, _WRITE_FILE, _TRUNCATE, _IOCTL_DEV, _EXECUTE = 1 << 2, 1 << 3, 1 << 1, 1 << 14, 1 << 15, 1
_CHANGE_TREE = sum(1 << bit for bit in (4, 5, 7, 8, 9, 10, 12))

_SYSTEM_PATHS = (
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/share",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/os-release",
    "/etc/passwd",
    "/dev/urandom",
    "/dev/random",
    "/dev/zero",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/sys/kernel",
    "/proc/sys/vm",
    "/sys/devices/system",
    "/sys/fs/cgroup",
)


def readable_paths(environment: str, artifact: Sequence[str]) -> list[str]:
    """Return every path that a runner of the environment (a directory) reads; a path that does not exist is left out."""
    here = os.path.dirname(os.path.abspath(__file__))
    # Not the base prefix as a whole: that may be /usr, and a home may lie below it.
    base = [os.path.join(prefix, part) for prefix in (sys.base_prefix, sys.base_exec_prefix) for part in ("bin", "lib", "lib64", "share")]
    wanted = [*_SYSTEM_PATHS, environment, *base, here, *artifact]
    return [path for path in dict.fromkeys(wanted) if path and os.path.exists(path)]


def _restrict_files(readable: list[str], scratch: str | None) -> None:
    libc = _c()
    abi = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        raise OSError(errno.ENOSYS, "the kernel has no Landlock")
    files_handled = (1 << 13) - 1
    for since_abi, bit in ((2, 13), (3, 14), (5, 15)):
        if abi >= since_abi:
            files_handled |= 1 << bit
    tcp_bind_connect = 3 if abi >= 4 else 0
    abstract_sockets_signals = 3 if abi >= 6 else 0
    fields = [files_handled, tcp_bind_connect, abstract_sockets_signals][: 1 if abi < 4 else 2 if abi < 6 else 3]
    attributes = struct.pack(f"<{len(fields)}Q", *fields)
    ruleset = _check(libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock")
    try:
        for path in readable:
            _allow(ruleset, path, (_READ_FILE | _READ_DIR) & files_handled)
        _allow(ruleset, "/dev/null", (_READ_FILE | _WRITE_FILE | _TRUNCATE) & files_handled)
        if scratch is not None:
            everything = _READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _CHANGE_TREE
            _allow(ruleset, scratch, everything & files_handled)
        _check(libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock")
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            access &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        rule = struct.pack("<Qi", access, descriptor)
        _check(_c().syscall(_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), f"landlock rule for {path}")
    finally:
        os.close(descriptor)


# seccomp ------------------------------------------------------------------------------------------------------

# Number on x86_64, number on aarch64; None where the architecture has no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # Reaching other machines and processes. A runner is handed its listening socket; accept() needs no socket().
    "socket": (41, 198),
    "connect": (42, 203),
    "socketpair": (53, 199),  # a pair of datagram sockets can send to any socket that has a path
    "bind": (49, 200),
    "listen": (50, 201),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # Starting programs and processes; threads are told apart below.
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    # Other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    # Owner, mode and times of files: Landlock does not govern them.
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    # The machine.
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "personality": (135, 92),
    "quotactl": (179, 60),
    "fanotify_init": (300, 262),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "syslog": (103, 116),
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE, _CLONE3, _KILL, _TGKILL, _PRLIMIT64, _PRCTL = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261), (157, 167)
_CLONE_THREAD = 0x00010000
_X32_BIT = 0x40000000
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_FIRST_ARGUMENT = 0, 4, 16


def build_filter(machine: str, pid: int) -> bytes:
    """Return the BPF program for ``machine`` (``x86_64`` or ``aarch64``) in a process with this ``pid``.

    Raises
    ------
    OSError
        No list of system calls for this machine.
    """
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no system-call filter for {machine}")
    column, audit_architecture = _ARCHITECTURES[machine]
    program = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, audit_architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
    ]
    if machine == "x86_64":
        program += [(_JUMP_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    # glibc falls back to clone(), whose flags can be read here, when clone3() does not exist.
    program += [(_JUMP_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    program += _unless_first_argument(_CLONE[column], [(_JUMP_BITS, _CLONE_THREAD)], errno.EPERM)
    for number in (_KILL[column], _TGKILL[column]):
        program += _unless_first_argument(number, [(_JUMP_EQUAL, pid)], errno.EPERM)
    program += _unless_first_argument(_PRLIMIT64[column], [(_JUMP_EQUAL, pid), (_JUMP_EQUAL, 0)], errno.EPERM)
    program += [
        # It dies with its supervisor, whatever the model says.
        (_JUMP_EQUAL, 0, 4, _PRCTL[column]),
        (_LOAD, 0, 0, _OFFSET_FIRST_ARGUMENT),
        (_JUMP_EQUAL, 0, 1, _PR_SET_PDEATHSIG),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    for numbers in _DENIED.values():
        number_or_none = numbers[column]
        if number_or_none is not None:
            program += [(_JUMP_EQUAL, 0, 1, number_or_none), (_RETURN, 0, 0, _ERRNO | errno.EACCES)]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _unless_first_argument(
    number: int,
    tests: list[tuple[int, int]],
    error: int,
) -> list[tuple[int, int, int, int]]:
    """Deny system call ``number`` unless the low half of its first argument passes one of ``tests``."""
    body = [(_LOAD, 0, 0, _OFFSET_FIRST_ARGUMENT)]
    for position, (jump, value) in enumerate(tests):
        to_allow = len(tests) - position
        body.append((jump, to_allow, 0, value))
    body += [(_RETURN, 0, 0, _ERRNO | error), (_RETURN, 0, 0, _ALLOW)]
    return [(_JUMP_EQUAL, 0, len(body), number), *body]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def _filter_system_calls() -> None:
    _c()
    code = build_filter(platform.machine(), os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.cast(ctypes.byref(program), ctypes.c_void_p))
