"""The gateway's pure parts: admission, verdicts, kept output, host limits, choice of zygote, the filter."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sandbox_gateway import host, mends, policy
from services.sandbox_gateway.admission import Admission
from services.sandbox_gateway.descriptors import Descriptors, sealed_memory
from services.sandbox_gateway.inside.messages import EXITED, REPORT_BYTES, Order, Program, Reply, read_report
from services.sandbox_gateway.output import HeadTail
from services.sandbox_gateway.tiers import TierChoice, tiers_for
from services.sandbox_gateway.verdict import Ending, judge


@given(
    slots=st.integers(1, 8),
    limit=st.integers(0, 8),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 8), st.integers(0, 30)), max_size=80),
)
def test_admission_never_exceeds_its_bounds_and_keeps_order(
    slots: int, limit: int, steps: list[tuple[bool, int, int]]
) -> None:
    admission = Admission(slots, limit)
    weights: dict[int, int] = {}
    running: set[int] = set()
    waiting: list[int] = []
    for number, (arrives, weight, which) in enumerate(steps):
        if arrives:
            weights[number] = min(weight, slots)
            decision = admission.offer(number, weights[number])
            if decision == "run":
                assert not waiting, "a newcomer overtook the queue"
                running.add(number)
            elif decision == "wait":
                waiting.append(number)
            else:
                assert len(waiting) == limit
        elif present := sorted(running) + waiting:
            leaver = present[which % len(present)]
            running.discard(leaver)
            waiting = [t for t in waiting if t != leaver]
            started = admission.leave(leaver)
            assert started == waiting[: len(started)], "the queue is first in, first out"
            running.update(started)
            waiting = waiting[len(started) :]
            assert admission.leave(leaver) == []
        assert sum(weights[t] for t in running) == admission.used_slots <= slots
        assert len(waiting) == admission.waiting <= limit
        assert not waiting or admission.used_slots + weights[waiting[0]] > slots, (
            "a slot stands idle while someone waits"
        )


def test_admission_refuses_what_could_never_run() -> None:
    with pytest.raises(ValueError, match="3 of 2"):
        Admission(2, 5).offer(1, 3)


@given(chunks=st.lists(st.binary(max_size=300), max_size=40), limit=st.integers(0, 400))
def test_kept_output_is_head_and_tail(chunks: list[bytes], limit: int) -> None:
    kept, whole = HeadTail(limit), b"".join(chunks)
    for chunk in chunks:
        kept.feed(chunk)
    assert kept.total_bytes == len(whole)
    assert kept.truncated == (len(whole) > limit)
    if not kept.truncated:
        assert kept.text() == whole.decode("utf-8", "replace")
    else:
        head, _, tail = kept.text().partition("\n… ")
        assert len(head.encode()) <= 3 * limit
        assert "bytes left out …\n" in tail


@given(text=st.text(alphabet="aé漢🎈", min_size=30, max_size=200), limit=st.integers(1, 60))
def test_kept_output_cuts_between_characters(text: str, limit: int) -> None:
    kept = HeadTail(limit)
    kept.feed(text.encode())
    if kept.truncated:
        head, _, rest = kept.text().partition("\n… ")
        tail = rest.partition("left out …\n")[2]
        assert text.startswith(head)
        assert text.endswith(tail)


def test_kept_output_is_bounded_in_memory() -> None:
    kept = HeadTail(1000)
    for _ in range(1000):
        kept.feed(b"x" * 65_536)
    assert len(kept._tail) + len(kept._head) < 200_000
    assert kept.total_bytes == 65_536_000


def exited(code: int, **ending: Any) -> Ending:
    return ending_of(code << 8, **ending)


def ending_of(wait_status: int, report: object = None, kill_reason: Any = None, cpu_s: float = 0.1) -> Ending:
    page = b"" if report is None else json.dumps(report).encode()
    return Ending(wait_status, kill_reason, cpu_s, 12, page.ljust(REPORT_BYTES, b"\0"))


def test_verdicts_of_exits() -> None:
    assert judge(exited(0)).status == "ok"
    assert judge(exited(0, report={"type": "E", "message": "m", "memory": True})).status == "ok"
    assert judge(exited(0, kill_reason="timeout")).status == "ok"  # it was done before the kill arrived
    error = judge(exited(1, report={"type": "E", "message": "m", "line": 3}))
    assert (error.status, error.exit_code, error.signal) == ("error", 1, None)
    assert error.error is not None
    assert (error.error.type, error.error.message, error.error.line) == ("E", "m", 3)
    assert judge(exited(1, report={"type": "MemoryError", "message": "", "memory": True})).status == "memory_limit"
    assert judge(exited(125)).status == "error"


def test_verdicts_of_signals() -> None:
    assert judge(ending_of(signal.SIGKILL, kill_reason="timeout")).status == "timeout"
    assert judge(ending_of(signal.SIGKILL, kill_reason="output_limit")).status == "output_limit"
    assert judge(ending_of(signal.SIGKILL, cpu_s=12.0)).status == "timeout"
    assert judge(ending_of(signal.SIGKILL)).status == "killed"
    assert judge(ending_of(signal.SIGXCPU)).status == "timeout"
    crash = judge(ending_of(signal.SIGSEGV | 0x80, kill_reason="timeout"))
    assert (crash.status, crash.exit_code, crash.signal) == ("killed", None, signal.SIGSEGV)


HOSTILE_REPORTS = (
    [], "x", 1, None, {}, {"type": 1, "message": "m"}, {"type": "E"}, {"type": "E", "message": ["m"]},
    {"type": "E", "message": "m", "line": "9"}, {"type": "E", "message": "m", "line": -1},
    {"type": "E", "message": "m", "line": 2**40}, {"type": "E", "message": "m", "line": True},
)  # fmt: skip


@pytest.mark.parametrize("report", HOSTILE_REPORTS)
def test_hostile_reports_change_no_status(report: object) -> None:
    verdict = judge(exited(1, report=report))
    assert verdict.status == "error"
    assert verdict.error is None or verdict.error.line is None


@given(st.binary(max_size=REPORT_BYTES))
def test_any_report_page_can_be_read(page: bytes) -> None:
    assert isinstance(read_report(page), dict)
    assert judge(Ending(1 << 8, None, 0.0, 12, page)).status in ("error", "memory_limit")


def test_deep_and_surrogate_reports() -> None:
    assert read_report(b"[" * 4000 + b"\0") == {}
    verdict = judge(Ending(1 << 8, None, 0.0, 12, b'{"type": "\\ud800", "message": "\\udfff"}\0'))
    assert verdict.error is not None
    assert verdict.error.model_dump_json()


def test_messages_have_fixed_bytes() -> None:
    order = Order(7, 32 << 20)
    assert order.pack().hex() == "07000000000000000000000200000000"
    program = Program(1 << 30, 12, -1, True, b"1")
    assert program.pack().hex() == "00000040000000000c00000000000000ffffffffffffffff0131"
    reply = Reply(EXITED, 7, 139, 0.5, 2048)
    assert reply.pack().hex() == "0207000000000000008b00000000000000000000000000e03f0008000000000000"
    assert (Order.unpack(order.pack()), Reply.unpack(reply.pack())) == (order, reply)
    assert Program.unpack(program.pack()) == program


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal:       16777216 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_memory_of_a_bare_host(tmp_path: Path) -> None:
    assert host.memory_bytes(write(tmp_path, {"proc/self/cgroup": "0::/\n"})) == 16 << 30


def test_memory_of_a_container_version_2(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "4294967296\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
    }
    write(tmp_path, files)
    assert host.memory_bytes(tmp_path) == 4 << 30
    assert host.cores(tmp_path) == 1


def test_memory_of_a_nested_group_version_2(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "2147483648\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
    }
    assert host.memory_bytes(write(tmp_path, files)) == 2 << 30


def test_memory_of_a_container_version_1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "3221225472\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    write(tmp_path, files)
    assert host.memory_bytes(tmp_path) == 3 << 30
    assert host.cores(tmp_path) >= 1


def test_memory_shortfall_names_the_largest_number_that_fits() -> None:
    assert host.memory_shortfall(4, 1024, 5 << 30) is None
    shortfall = host.memory_shortfall(5, 1024, 5 << 30)
    assert shortfall is not None
    assert "to at most 4" in shortfall


def test_zygotes_are_chosen_by_what_the_code_names() -> None:
    tiers = tiers_for(("numpy", "scipy", "sympy"))
    assert [(t.name, t.preload) for t in tiers] == [
        ("plain", ()),
        ("maths", ("numpy", "sympy")),
        ("libraries", ("numpy", "scipy", "sympy")),
    ]
    choice = TierChoice(tiers)
    assert choice.ranking("print(1)")[0] == "plain"
    assert choice.ranking("import numpy as np")[0] == "maths"
    assert choice.ranking("from scipy.optimize import root\nimport numpy")[0] == "libraries"
    assert choice.ranking("mynumpyx = 1")[0] == "plain"
    assert sorted(choice.ranking("import numpy")) == ["libraries", "maths", "plain"]
    assert TierChoice(tiers_for(())).ranking("import numpy") == ["plain"]
    assert [t.name for t in tiers_for(("pandas",))] == ["plain", "libraries"]


def test_every_allowed_call_exists() -> None:
    import pyseccomp

    unknown = [name for name in policy.ALLOWED if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) == -1]
    assert not unknown
    assert len(set(policy.ALLOWED)) == len(policy.ALLOWED)
    assert len(policy.compile_bpf()) % 8 == 0


def test_policy_version_is_stable() -> None:
    assert policy.policy_version() == policy.policy_version()
    assert int(policy.policy_version(), 16) >= 0


def test_mends_name_the_cause() -> None:
    said = "bwrap: No permissions to creating new namespace, likely because the kernel does not allow it."
    assert "seccomp.json" in mends.mend(said)
    assert "AppArmor" in mends.mend("bwrap: setting up uid map: Permission denied")
    assert "docs/sandbox.md" in mends.mend("something new")


def test_descriptors_close_once() -> None:
    with Descriptors() as owned:
        read, write_end = owned.pipe(owned)
        owned.close(read)
        reused = sealed_memory("x", b"abc")
        owned.close(read)  # the number may be another's now
        assert reused >= 0
        import os

        assert os.pread(reused, 3, 0) == b"abc"
        with pytest.raises(OSError, match="not permitted"):
            os.pwrite(reused, b"x", 0)
        os.close(reused)
        assert write_end >= 0
