"""The names that profiles use, and the kernel's numbers for them.

From the uapi headers capability.h, securebits.h, sched.h, fcntl.h, mman.h and prctl.h. Numbers
that differ between architectures come from Python's own modules, which were compiled for ours.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
import termios

_CAPABILITY_NAMES = """
chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable
net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio
sys_chroot sys_ptrace sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time sys_tty_config
mknod lease audit_write audit_control setfcap mac_override mac_admin syslog wake_alarm
block_suspend audit_read perfmon bpf checkpoint_restore
"""

CAPABILITIES: dict[str, int] = {n: bit for bit, n in enumerate(_CAPABILITY_NAMES.split())}

SECUREBITS: dict[str, int] = {
    name: 1 << number
    for number, name in enumerate(
        (
            "noroot",
            "noroot-locked",
            "no-setuid-fixup",
            "no-setuid-fixup-locked",
            "keep-caps",
            "keep-caps-locked",
            "no-cap-ambient-raise",
            "no-cap-ambient-raise-locked",
        )
    )
}

NAMESPACES: dict[str, int] = {
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
    "mount": 0x00020000,
}

LIMITS: dict[str, int] = {
    name: getattr(resource, f"RLIMIT_{name.upper()}")
    for name in ("as", "core", "cpu", "data", "fsize", "memlock", "msgqueue", "nofile", "nproc")
}

ARGUMENTS: dict[str, int] = {
    "PROT_READ": mmap.PROT_READ,
    "PROT_WRITE": mmap.PROT_WRITE,
    "PROT_EXEC": mmap.PROT_EXEC,
    "AT_EMPTY_PATH": 0x1000,
    "AF_UNIX": socket.AF_UNIX,
    "SOL_SOCKET": socket.SOL_SOCKET,
    "SO_SNDBUF": socket.SO_SNDBUF,
    "SO_OOBINLINE": socket.SO_OOBINLINE,
    "SO_PASSRIGHTS": 83,  # Linux 6.16
    "SHUT_RDWR": socket.SHUT_RDWR,
    "SPLICE_F_NONBLOCK": 2,
    "O_NONBLOCK": os.O_NONBLOCK,
    "O_CLOEXEC": os.O_CLOEXEC,
    "O_WRONLY": os.O_WRONLY,
    "O_RDWR": os.O_RDWR,
    "O_CREAT": os.O_CREAT,
    "O_TRUNC": os.O_TRUNC,
    "O_APPEND": os.O_APPEND,
    "F_DUPFD_CLOEXEC": fcntl.F_DUPFD_CLOEXEC,
    "F_GETFD": fcntl.F_GETFD,
    "F_SETFD": fcntl.F_SETFD,
    "F_GETFL": fcntl.F_GETFL,
    "F_SETFL": fcntl.F_SETFL,
    "F_ADD_SEALS": fcntl.F_ADD_SEALS,
    "F_GET_SEALS": fcntl.F_GET_SEALS,
    "F_GETPIPE_SZ": getattr(fcntl, "F_GETPIPE_SZ", 1032),
    "F_SETPIPE_SZ": getattr(fcntl, "F_SETPIPE_SZ", 1031),
    "FIONBIO": termios.FIONBIO,
    "TCGETS": termios.TCGETS,
    "SIGCHLD": signal.SIGCHLD,
    "CLONE_VM": 0x00000100,
    "CLONE_THREAD": 0x00010000,
    "CLONE_VFORK": 0x00004000,
    "CLONE_NEWNS": 0x00020000,
    "CLONE_NEWCGROUP": 0x02000000,
    "CLONE_NEWUTS": 0x04000000,
    "CLONE_NEWIPC": 0x08000000,
    "CLONE_NEWUSER": 0x10000000,
    "CLONE_NEWPID": 0x20000000,
    "CLONE_NEWNET": 0x40000000,
    "PR_GET_DUMPABLE": 3,
    "PR_SET_DUMPABLE": 4,
    "PR_SET_NAME": 15,
    "PR_SET_PDEATHSIG": 1,
    "PR_GET_SECCOMP": 21,
    "PR_SET_SECCOMP": 22,
    "SECCOMP_SET_MODE_FILTER": 1,
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "PR_CAPBSET_READ": 23,
    "PR_SET_NO_NEW_PRIVS": 38,
    "PR_GET_NO_NEW_PRIVS": 39,
    "PR_CAP_AMBIENT": 47,
    "PR_SET_VMA": 0x53564D41,
}

ERRNOS: dict[str, int] = {name: number for number, name in errno.errorcode.items()}
