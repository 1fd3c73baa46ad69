"""The users' file that ``init`` writes, in a real Redis."""

from __future__ import annotations

import re
import runpy
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import redis

from singlestream.contracts import Purpose
from singlestream.embedded_redis import find_server
from singlestream.streams import Keys
from tests.deploy.conftest import DEPLOY, ROOT, wait_for


def answers(socket: Path) -> bool:
    """Whether Redis is there and has loaded its file; asked as compose's health check asks."""
    with redis.Redis(unix_socket_path=str(socket), username="probe", password="-") as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def start_redis(folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A Redis as compose starts it, with the users that ``init`` writes, on a socket."""
    passwords = {name: f"of-{name}" for name in ("value_store", "rollout", "learner")}
    (folder / "users.acl").write_text(runpy.run_path(str(DEPLOY / "init"), run_name="init")["acl_text"](passwords))
    settings = ["--port", "0", "--unixsocket", folder / "s", "--aclfile", folder / "users.acl", "--dir", folder]
    arguments = [find_server(), DEPLOY / "redis" / "redis.conf", *settings, "--logfile", folder / "log"]
    process = subprocess.Popen([str(part) for part in arguments])
    wait_for(lambda: answers(folder / "s"), "Redis")
    return process, folder / "s"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    process, socket = start_redis(tmp_path_factory.mktemp("acl"))
    yield socket
    process.terminate()
    process.wait(60)


def keys_named(name: str, user: str) -> set[str]:
    """Keys of run ``r`` that an attribute of `Keys` stands for, where ``user`` asks for them."""
    value = getattr(Keys("r"), name)
    if name == "fence":
        return {value(user)}
    if name == "outstanding":
        return {value("train")}
    return {value(purpose) for purpose in get_args(Purpose)} if name in ("leases", "results") else {value}


class TestRedisRights:
    """The users' file that ``init`` writes, in a real Redis."""

    @pytest.fixture
    def connect(self, server: Path) -> Iterator[Callable[[str], redis.Redis]]:
        clients = []

        def connect(name: str) -> redis.Redis:
            clients.append(redis.Redis(unix_socket_path=str(server), username=name, password=f"of-{name}"))
            return clients[-1]

        yield connect
        for client in clients:
            client.close()

    def test_nobody_enters_without_a_name(self, server: Path) -> None:
        with redis.Redis(unix_socket_path=str(server)) as client, pytest.raises(redis.AuthenticationError):
            client.ping()

    def test_the_probe_can_ping_and_nothing_else(self, connect: Callable[[str], redis.Redis]) -> None:
        assert connect("probe").ping()
        for command in (("GET", "ss:r:state"), ("INFO",), ("KEYS", "*")):
            with pytest.raises(redis.exceptions.NoPermissionError):
                connect("probe").execute_command(*command)

    def test_a_rollout_cannot_write_values_or_versions(self, connect: Callable[[str], redis.Redis]) -> None:
        rollout = connect("rollout")
        rollout.xadd("ss:r:trajectories", {"id": "1", "m": b""})
        rollout.hset("ss:r:live", "1", "0-1")
        assert rollout.xrange("ss:r:policy_versions") == []
        for key in (
            "values",
            "ledger",
            "prompts",
            "outstanding:train",
            "state",
            "fence:learner",
            "policy_versions",
            "lineage",
        ):
            for command in (("SET", f"ss:r:{key}", "1"), ("HSET", f"ss:r:{key}", "a", "1"), ("DEL", f"ss:r:{key}")):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    rollout.execute_command(*command)
        with pytest.raises(redis.ResponseError, match=r"(?i)permission|can't access|NOPERM"):
            rollout.eval("return redis.call('SET', KEYS[1], 1)", 1, "ss:r:values")

    @pytest.mark.parametrize(
        ("user", "sources"),
        [
            ("rollout", ["services/rollout/*.py", "singlestream/streams/leases.py", "singlestream/streams/pins.py"]),
            (
                "learner",
                ["services/learner/*.py", "singlestream/streams/training.py", "singlestream/streams/anchors.py"],
            ),
        ],
    )
    def test_a_service_may_use_every_key_that_its_source_names(
        self, connect: Callable[[str], redis.Redis], user: str, sources: list[str]
    ) -> None:
        source = "\n".join(path.read_text() for pattern in sources for path in ROOT.glob(pattern))
        named = set(re.findall(r"\bkeys\.(\w+)", source)) - {"run"}
        found = {key for name in named for key in keys_named(name, user)}
        assert len(found) > 8
        for key in sorted(found):
            connect(user).exists(key)

    @pytest.mark.parametrize(
        ("user", "sources", "targets"),
        [
            ("rollout", ["leases"], {"leases", "results", "posterior_updates", "dead_letters"}),
            ("learner", ["training", "anchors"], set()),
        ],
    )
    def test_a_service_may_read_and_write_every_key_that_it_gives_to_a_script(
        self, connect: Callable[[str], redis.Redis], user: str, sources: list[str], targets: set[str]
    ) -> None:
        """Redis asks for both rights, whatever the script does. Each script's first line names its keys."""
        source = "\n".join((ROOT / "singlestream" / "streams" / f"{name}.py").read_text() for name in sources)
        given = targets.copy()
        for line in re.findall(r"^-- KEYS: (.*?)(?:   |$)", source, re.M):
            given |= set(line.split(", ")) - {"target..."}
        assert given >= (
            {"live", "leases"} if user == "rollout" else {"fence", "trajectories", "outstanding", "anchors"}
        )
        for key in sorted(key for name in given for key in keys_named(name, user)):
            assert connect(user).eval("return 1", 1, key) == 1

    def test_a_rollout_marks_its_node_and_reads_the_pin(self, connect: Callable[[str], redis.Redis]) -> None:
        rollout = connect("rollout")
        rollout.hset("ss:r:draining", "node", "1.0")
        rollout.hdel("ss:r:draining", "node")
        rollout.set("ss:r:rollout_cap", "3")
        assert rollout.get("ss:r:pin") is None
        with pytest.raises(redis.exceptions.NoPermissionError):
            rollout.set("ss:r:pin", "x")

    def test_the_value_store_may_have_the_file_written_anew(self, connect: Callable[[str], redis.Redis]) -> None:
        store = connect("value_store")
        assert store.info("persistence")["aof_enabled"]
        assert store.execute_command("BGREWRITEAOF")

    def test_the_learner_sees_no_values(self, connect: Callable[[str], redis.Redis]) -> None:
        learner = connect("learner")
        learner.xadd("ss:r:policy_versions", {"id": "", "m": b""})
        for command in (
            ("HGETALL", "ss:r:values"),
            ("HGETALL", "ss:r:prompts"),
            ("SET", "ss:r:state", "1"),
            ("XADD", "ss:r:leases:train", "*", "a", "b"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                learner.execute_command(*command)

    @pytest.mark.parametrize("user", ["value_store", "rollout", "learner"])
    def test_nobody_administers(self, connect: Callable[[str], redis.Redis], user: str) -> None:
        for command in (("FLUSHALL",), ("CONFIG", "GET", "*"), ("ACL", "LIST"), ("KEYS", "*"), ("SHUTDOWN",)):
            with pytest.raises(redis.exceptions.NoPermissionError):
                connect(user).execute_command(*command)


def test_transactions_survive_a_killed_redis(tmp_path: Path) -> None:
    """Redis loads its file as the default user, and leaves out what that user may not do."""
    process, socket = start_redis(tmp_path)
    with redis.Redis(unix_socket_path=str(socket), username="value_store", password="of-value_store") as client:
        with client.pipeline(transaction=True) as pipe:
            pipe.hset("ss:r:values", "p", "1").hincrby("ss:r:ledger", "train:leased", 1).execute()
        client.eval("redis.call('HSET', KEYS[1], 'q', 2) redis.call('SET', KEYS[2], 1)", 2, "ss:r:values", "ss:r:state")
    process.kill()
    process.wait()
    process, socket = start_redis(tmp_path)
    try:
        with redis.Redis(unix_socket_path=str(socket), username="value_store", password="of-value_store") as client:
            assert client.hgetall("ss:r:values") == {b"p": b"1", b"q": b"2"}
            assert client.hgetall("ss:r:ledger") == {b"train:leased": b"1"}
            assert client.get("ss:r:state") == b"1"
    finally:
        process.terminate()
        process.wait(60)
