"""Weights over HTTP, from the learner's own publisher and server to a replica's memory volume on another machine."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from services.learner.publication import seal
from services.learner.publisher import Publisher
from services.learner.weights_http import WeightFiles
from services.rollout import weight_fetch
from services.rollout.manifest import open_weights
from services.rollout.metrics import Metrics
from services.rollout.weight_fetch import Stopped, WeightFetcher, checked_weights
from singlestream.config import Config
from singlestream.contracts import PolicyVersion
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.errors import ConfigError, DeadlineExceeded, WeightsError
from singlestream.streams import Keys
from singlestream.weight_files import delta_name, weights_name
from tests.services.rollout.weight_source import TOKEN, BreakingWire, Source, replica_run

Tensors = dict[str, torch.Tensor]


def tensors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("a", (300, 400)), ("b", (7,)))}


def step(old: Tensors, seed: int, share: float = 0.01) -> Tensors:
    """A few values move a little, as they do at a small learning rate."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(one.shape, generator=generator) < share, one * 1.01, one)
        for name, one in old.items()
    }


def noise() -> Tensors:
    """Random bit patterns, without infinities and NaN: nothing that could be packed."""
    generator = torch.Generator().manual_seed(9)
    bits = {n: torch.randint(-(2**15), 2**15, one.shape, generator=generator) for n, one in tensors().items()}
    finite = {n: torch.where(one & 0x7F80 == 0x7F80, 0, one) for n, one in bits.items()}
    return {n: one.to(torch.int16).view(torch.bfloat16) for n, one in finite.items()}


@pytest.fixture
def make(tmp_path: Path, redis_server: EmbeddedRedis, keys: Keys) -> Iterator[Any]:
    made: list[Any] = []

    def make_source(cuts: list[int] | None = None) -> Source:
        wire = None if cuts is None else BreakingWire(cuts)
        one = Source(tmp_path, redis_server.url, keys.run, url=wire.url if wire else None)
        if wire is not None:
            wire.target = one.port
            made.append(wire)
        made.append(one)
        return one

    yield make_source
    for one in made:
        one.close()


def fetcher(source: Source, folder: Path) -> WeightFetcher:
    return WeightFetcher(replica_run(source, folder), Metrics(), timeout_s=20.0)


def values(version: PolicyVersion, path: Path) -> Tensors:
    data = bytearray(path.read_bytes())
    return {
        e.name: torch.frombuffer(data, dtype=torch.bfloat16, count=e.nbytes // 2, offset=e.offset).view(e.shape)
        for e in version.manifest.tensors
    }


def assert_here(version: PolicyVersion, one: WeightFetcher, expected: Tensors) -> None:
    path = one.folder / weights_name(version.version, version.lineage)
    got = values(version, path)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor.bfloat16())
    assert not list(one.folder.glob("*.partial")) and not list(one.folder.glob("*.delta"))


def count(one: WeightFetcher, kind: str) -> tuple[int, int]:
    """(fetches, bytes on the wire) of a kind."""
    return (
        int(one.metrics.fetches.labels(kind)._value.get()),
        int(one.metrics.fetched_bytes.labels(kind)._value.get()),
    )


def test_a_joiner_fetches_the_whole_file_and_then_deltas(make: Any, tmp_path: Path) -> None:
    source = make()
    one = fetcher(source, tmp_path / "elsewhere")
    states = [tensors()]
    first = source.publish(0, states[0])
    assert first.manifest.remote is not None and first.manifest.remote.deltas == []
    assert one.fetch(first).checked
    assert_here(first, one, states[0])
    for version in (1, 2, 3, 4):
        states.append(step(states[-1], version))
        published = source.publish(version, states[-1])
        if version != 3:  # passed over: two deltas lead to version 4
            one.fetch(published)
            assert_here(published, one, states[version])
    size = first.manifest.total_bytes
    assert count(one, "full") == (1, size)
    fetches, sent = count(one, "delta")
    assert fetches == 3
    assert sent < 4 * 0.06 * size
    assert source.publisher.delta_ratio is not None and source.publisher.delta_ratio < 0.06
    assert sorted(p.name for p in one.folder.glob("v*")) == [weights_name(2, 1), weights_name(4, 1)]
    assert not one.fetch(published).checked, "it is there already"

    other = noise()
    published = source.publish(5, other)
    assert published.manifest.remote is not None and published.manifest.remote.deltas == []
    assert source.publisher.delta_ratio == 1.0
    one.fetch(published)
    assert_here(published, one, other)
    assert count(one, "full")[0] == 2
    here = {path.name for path in source.publisher.folder.iterdir()}
    assert here == {weights_name(4, 1), weights_name(5, 1), "next.weights.partial"}, "deltas to nowhere are gone"


def test_a_connection_cut_again_and_again_goes_on_where_it_broke(make: Any, tmp_path: Path) -> None:
    source = make([100_000, 200, 0, 90_000])
    published = source.publish(0, tensors())
    one = fetcher(source, tmp_path / "elsewhere")
    one.fetch(published)
    assert_here(published, one, tensors())
    assert count(one, "full") == (1, published.manifest.total_bytes), "no byte was sent twice"


def test_another_process_goes_on_with_what_is_there(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_fetch, "ATTEMPTS", 1)
    source = make([100_000, 0])
    published = source.publish(0, tensors())
    one = fetcher(source, tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="1 attempts without progress"):
        one.fetch(published)
    other = fetcher(source, tmp_path / "elsewhere")
    other.fetch(published)
    assert_here(published, other, tensors())
    assert count(other, "full")[1] < published.manifest.total_bytes - 90_000


def test_a_download_that_only_trickles_has_an_end(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection brings something, so no attempt counts as failed."""
    monkeypatch.setattr(weight_fetch, "SLOWEST_BYTES_PER_S", 1e9)
    source = make([20_000] * 8)
    published = source.publish(0, tensors())
    size = published.manifest.total_bytes
    hasty = WeightFetcher(replica_run(source, tmp_path / "elsewhere"), Metrics(), timeout_s=1.0)
    with pytest.raises(DeadlineExceeded, match=f"for the {size} bytes of http://.*/weights/{weights_name(0, 1)}"):
        hasty.fetch(published)
    patient = fetcher(source, tmp_path / "elsewhere")
    patient.fetch(published)
    assert_here(published, patient, tensors())
    assert count(patient, "full")[1] < size, "what had come was of use"


def test_a_learner_that_is_away_is_given_up_with_its_cause(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_fetch, "BACKOFF_S", 0.01)
    source = make()
    published = source.publish(0, tensors())
    source.server.close()
    one = fetcher(source, tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="5 attempts without progress, the last: ConnectError"):
        one.fetch(published)
    assert not list(one.folder.glob("v*"))


def test_a_version_that_newer_ones_replaced_is_gone(make: Any, tmp_path: Path) -> None:
    source = make()
    old = source.publish(0, tensors())
    for version in (1, 2):
        source.publish(version, tensors(version))
    with pytest.raises(WeightsError, match="404"):
        fetcher(source, tmp_path / "elsewhere").fetch(old)


def test_without_the_token_nothing_is_served(make: Any, tmp_path: Path) -> None:
    source = make()
    published = source.publish(0, tensors())
    run = replica_run(source, tmp_path / "elsewhere").model_copy(update={"weights_token": None})
    with pytest.raises(WeightsError, match="401"):
        WeightFetcher(run, Metrics(), 20.0).fetch(published)


@pytest.mark.parametrize("where", ["the base", "the delta", "the file"])
def test_damage_is_found_and_the_whole_file_fetched_once_more(make: Any, tmp_path: Path, where: str) -> None:
    source = make()
    one = fetcher(source, tmp_path / "elsewhere")
    old, new = tensors(), step(tensors(), 1)
    base = one.folder / weights_name(0, 1)
    one.fetch(source.publish(0, old))
    published = source.publish(1, new)
    served = source.publisher.folder / delta_name(1, 1)
    file = one.folder / weights_name(1, 1)
    if where == "the base":
        flip(base)
    elif where == "the delta":
        flip(served)
    else:
        one.fetch(published)
        flip(file)
    with checked_weights(published, one) as weights:
        weights.check_bytes()
        assert weights.manifest.path == str(file)
    assert_here(published, one, new)
    assert count(one, "full")[0] == 2


def test_a_file_that_is_damaged_at_its_source_is_never_given_its_name(make: Any, tmp_path: Path) -> None:
    source = make()
    one = fetcher(source, tmp_path / "elsewhere")
    published = source.publish(0, tensors())
    flip(source.publisher.folder / weights_name(0, 1))
    with pytest.raises(WeightsError, match="a: checksum differs"):
        one.fetch(published)
    assert not list(one.folder.glob("v*"))


def test_a_damaged_file_of_this_machine_is_fetched_again(make: Any, tmp_path: Path) -> None:
    """The learner's file lies on this machine, but not as it should be; over HTTP there is the right one."""
    source = make()
    one = fetcher(source, tmp_path / "elsewhere")
    published = source.publish(0, tensors())
    local = tmp_path / "here"
    local.write_bytes((source.publisher.folder / weights_name(0, 1)).read_bytes())
    flip(local)
    manifest = published.manifest.model_copy(update={"path": str(local)})
    with checked_weights(published.model_copy(update={"manifest": manifest}), one) as weights:
        weights.check_bytes()
    alone = manifest.model_copy(update={"remote": None})
    cm = checked_weights(published.model_copy(update={"manifest": alone}), one)
    with pytest.raises(WeightsError, match="checksum differs"), cm:
        pass


def test_several_replicas_of_a_machine_fetch_once(make: Any, tmp_path: Path) -> None:
    source = make()
    published = source.publish(0, tensors())
    several = [fetcher(source, tmp_path / "elsewhere") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: one.fetch(published), several))
    assert sorted(one.checked for one in found) == [False, False, False, True]
    for one in found:
        with open_weights(one.version.manifest) as weights:
            weights.check_bytes()
    assert sum(count(one, "full")[0] for one in several) == 1


def test_a_replica_that_stops_does_not_wait_for_a_fetch(make: Any, tmp_path: Path) -> None:
    source = make([0] * 100)
    published = source.publish(0, tensors())
    one = fetcher(source, tmp_path / "elsewhere")
    stop = threading.Event()
    one.stopping = stop.is_set
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(one.fetch, published)
        time.sleep(0.1)
        stop.set()
        with pytest.raises(Stopped):
            running.result(timeout=10)


@pytest.mark.parametrize("named", [False, True], ids=["in its snapshot", "before its announcement"])
def test_what_a_crash_left_makes_room_at_the_next_start(make: Any, named: bool) -> None:
    source = make()
    for version in (0, 1):
        source.publish(version, tensors())
    snapshot = source.publisher.snapshot([(n, one.bfloat16()) for n, one in tensors().items()], 2)
    if named:
        seal(snapshot)
    folder = source.publisher.folder
    assert len(list(folder.iterdir())) >= 3
    Publisher(source.config, 2, source.link, source.files)
    kept = (1, 2) if named else (0, 1)
    assert sorted(path.name for path in folder.iterdir()) == [weights_name(version, 1) for version in kept]


def test_a_clock_that_is_set_back_removes_nothing_new(make: Any, tmp_path: Path) -> None:
    """By its time of writing the newest file would be the oldest, on the learner's machine and on others."""
    source, next_year_s = make(), time.time() + 365 * 86400
    one = fetcher(source, tmp_path / "elsewhere")
    for version in range(4):
        one.fetch(source.publish(version, tensors()))
        for folder in (source.publisher.folder, one.folder):
            kept = sorted(path.name for path in folder.glob("*.weights"))
            assert weights_name(version, 1) in kept and len(kept) <= 2
            if version < 2:
                os.utime(folder / weights_name(version, 1), (next_year_s, next_year_s))


def test_the_server_keeps_to_http(make: Any) -> None:
    source = make()
    published = source.publish(0, tensors())
    size, name = published.manifest.total_bytes, weights_name(0, 1)
    whole = (source.publisher.folder / name).read_bytes()
    base = f"http://127.0.0.1:{source.port}"
    with httpx.Client(base_url=base, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        reply = client.get(f"/weights/{name}")
        etag = reply.headers["etag"]
        assert (reply.status_code, reply.content) == (200, whole)
        head = client.head(f"/weights/{name}")
        assert (head.status_code, int(head.headers["content-length"]), head.content) == (200, size, b"")

        def ask(**headers: str) -> httpx.Response:
            return client.get(f"/weights/{name}", headers={k.replace("_", "-"): v for k, v in headers.items()})

        part = ask(Range="bytes=100-199")
        assert (part.status_code, part.content) == (206, whole[100:200])
        assert part.headers["content-range"] == f"bytes 100-199/{size}"
        assert ask(Range=f"bytes={size - 5}-").content == whole[-5:]
        assert ask(Range=f"bytes={size}-").status_code == 416
        assert ask(Range="bytes=0-1,5-6").status_code == 200
        assert ask(Range="bytes=5-", If_Range=etag).status_code == 206
        assert ask(Range="bytes=5-", If_Range='"another"').status_code == 200
        assert ask(If_None_Match=etag).status_code == 304
        assert ask(If_Match='"another"').status_code == 412
        for path in ("/weights/", "/weights/../learner.py", "/weights/v00000009-l1.weights", "/weights/.lock"):
            assert client.get(path).status_code == 404
        assert client.get("/metrics").status_code == 200, "metrics tell no weights and ask for no token"


def test_no_weights_off_loopback_without_a_token(make: Any) -> None:
    settings = make().config.model_dump()
    learner = {**settings["learner"], "metrics_host": "0.0.0.0"}  # noqa: S104
    config = Config(**{**settings, "learner": learner, "run": {**settings["run"], "weights_token": None}})
    with pytest.raises(ConfigError, match=r"run\.weights_token must be set"):
        WeightFiles.of(config)
    quiet = Config(**{**settings, "learner": {**learner, "weights_url": None}})
    assert WeightFiles.of(quiet) is None


def flip(path: Path) -> None:
    """Change a few bytes in the middle."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(255 - one for one in data[middle : middle + 8])
    path.write_bytes(data)
