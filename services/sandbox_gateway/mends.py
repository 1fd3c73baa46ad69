"""From what bubblewrap, the kernel or a canary says to what mends it."""

from __future__ import annotations

_PROFILE = "run the container with deploy/sandbox_gateway/seccomp.json"
_APPARMOR = (
    "allow user namespaces: sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for bwrap"
)

MENDS = (
    ("No permissions to creat", f"the container's seccomp profile forbids namespaces: {_PROFILE}"),
    ("Creating new namespace failed", "no more namespaces are allowed: raise sysctl user.max_user_namespaces"),
    ("setns", f"the container's seccomp profile lacks setns: {_PROFILE}"),
    ("clone a pid namespace", f"the container's seccomp profile lacks clone with namespaces: {_PROFILE}"),
    ("Failed to make / slave", "AppArmor forbids mounts: run the container with --security-opt apparmor=unconfined"),
    ("setting up uid map", _APPARMOR),
    ("loopback: Failed", _APPARMOR),
    ("largest: expected", "raise the gateway's hard limits: ulimit -Ht unlimited -Hv unlimited"),
    ("threads: expected", "thread limits need Linux 5.14 or newer, where they are counted per user namespace"),
    ("No module named", "install that module in the sandbox's Python, or take it off sandbox_gateway.preload"),
    ("starts threads", "take that module off sandbox_gateway.preload: runs can still import it"),
    ("apt-get install", "install it"),
)
"""Part of a message, and the mend."""


def mend(message: str) -> str:
    """What to do about a failed start."""
    for part, advice in MENDS:
        if part in message:
            return advice
    return "docs/sandbox.md says under 'Hosts' what a host must have"
