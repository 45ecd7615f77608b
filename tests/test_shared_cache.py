"""A Fisher cache behind a URL, on a real S3 server on loopback, and copies between caches."""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.cache import FisherCache, LocalCache, RemoteCache, copy_entries, open_cache
from dfmerge_studies.importance.cache.base import PAUSE
from tests.processes import Forked, context
from tests.project import Project
from tests.test_cache import KEY, same, values

OTHER = dataclasses.replace(KEY, expert="x" * 64)
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "secret-of-nobody",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadedMotoServer]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bucket(server: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, reached as a user does: credentials and endpoint in the environment."""
    host, port = server.get_host_and_port()
    for name, text in {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, text)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    name = f"bucket-{time.time_ns()}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}/fishers"


def objects(url: str) -> list[str]:
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    return sorted(path.rsplit("/", 1)[-1] for path in files.find(url))


def test_what_was_put_is_got_exactly_by_another_client(bucket: str) -> None:
    cache = RemoteCache(bucket)
    assert cache.get(KEY) is None
    cache.put(KEY, values())
    assert same(RemoteCache(bucket).get(KEY), values())
    assert cache.get(OTHER) is None


def test_entries_list_keys_sizes_and_uses(bucket: str) -> None:
    cache = RemoteCache(bucket)
    cache.put(KEY, values())
    [entry] = cache.entries()
    assert (entry.digest, entry.metadata["expert_name"]) == (KEY.digest, "red")
    assert entry.size > 100 * 7 * 4
    assert abs(entry.used - time.time()) < 3600


@pytest.mark.parametrize("part", [".safetensors", ".json"])
def test_a_damaged_object_is_set_aside_said_so_and_computed_again(bucket: str, part: str, caplog) -> None:
    cache = RemoteCache(bucket)
    cache.put(KEY, values())
    files = fsspec.filesystem("s3")
    [name] = [name for name in objects(bucket) if name.endswith(part)]
    content = files.cat_file(f"{bucket}/{name}")
    files.pipe_file(f"{bucket}/{name}", content[:-5] + bytes([content[-5] ^ 1]) + content[-4:-1])
    assert cache.get(KEY) is None
    assert "damaged" in caplog.text
    assert cache.get(KEY) is None
    cache.put(KEY, values())
    assert same(cache.get(KEY), values())
    assert cache.verify() == []
    assert len([name for name in objects(bucket) if ".damaged-" in name]) == 1


@pytest.mark.slow
def test_data_without_a_manifest_is_no_entry(bucket: str) -> None:
    """What a worker leaves that is killed between data and manifest."""
    cache = RemoteCache(bucket, grace=0)
    cache.put(KEY, values())
    [manifest] = [name for name in objects(bucket) if name.endswith(".json")]
    fsspec.filesystem("s3").rm_file(f"{bucket}/{manifest}")
    assert cache.get(KEY) is None
    assert cache.digests() == set()
    time.sleep(1.1)  # times of S3 have whole seconds
    cache.prune(10**9)
    assert objects(bucket) == []


def test_a_manifest_whose_data_is_gone_is_damaged(bucket: str, caplog) -> None:
    cache = RemoteCache(bucket)
    cache.put(KEY, values())
    [data] = [name for name in objects(bucket) if name.endswith(".safetensors")]
    fsspec.filesystem("s3").rm_file(f"{bucket}/{data}")
    assert cache.get(KEY) is None
    assert "data that is not there" in caplog.text


def _write(url: str, seed: int, times: int) -> None:
    cache = RemoteCache(url)
    for _ in range(times):
        cache.put(KEY, values(seed))


@pytest.mark.slow
def test_two_workers_that_compute_the_same_key_leave_one_valid_entry(bucket: str) -> None:
    """Their values differ in rounding, as on two kinds of machines: whichever manifest is last, its data is whole."""
    writers = [Forked(_write, bucket, seed, 10) for seed in (1, 2)]
    reader, seen = RemoteCache(bucket), 0
    while any(writer.poll() is None for writer in writers):
        found = reader.get(KEY)
        seen += found is not None
        assert found is None or same(found, values(1)) or same(found, values(2))
    assert [writer.returncode for writer in writers] == [0, 0]
    assert reader.digests() == {KEY.digest}
    assert reader.get(KEY) is not None
    assert reader.verify() == []


@pytest.mark.slow
def test_the_least_recently_used_go_first_and_none_that_is_in_use(bucket: str) -> None:
    keys = [dataclasses.replace(KEY, expert=str(i) * 64) for i in range(3)]
    cache = RemoteCache(bucket, grace=2)
    cache.put(keys[0], values(0))
    cache.put(keys[1], values(1))
    time.sleep(3.1)  # times of S3 have whole seconds
    RemoteCache(bucket).get(keys[0])
    cache.put(keys[2], values(2))
    deleted = cache.prune(0)
    assert [keys[1].digest in path for path in deleted] == [True]
    assert cache.get(keys[1]) is None
    assert same(cache.get(keys[0]), values(0))
    assert same(cache.get(keys[2]), values(2))


def test_push_and_pull_copy_what_is_missing_and_nothing_damaged(bucket: str, tmp_path: Path) -> None:
    local, shared, elsewhere = LocalCache(tmp_path / "a"), RemoteCache(bucket), LocalCache(tmp_path / "b")
    local.put(KEY, values(1))
    local.put(OTHER, values(2))
    file = local.file_of(OTHER.digest)
    file.write_bytes(file.read_bytes()[:-1])
    done = copy_entries(local, shared)
    assert (done.copied, done.present, [digest for digest, _ in done.damaged]) == ([KEY.digest], 0, [OTHER.digest])
    assert copy_entries(local, shared).present == 1
    assert copy_entries(shared, elsewhere).copied == [KEY.digest]
    (mine, about_mine), (theirs, about_theirs) = local.load(KEY.digest), elsewhere.load(KEY.digest)
    assert same(theirs, mine)
    assert about_theirs == about_mine


def test_any_fsspec_url_will_do(tmp_path: Path) -> None:
    cache = open_cache("memory://fishers", tmp_path)
    assert isinstance(cache, RemoteCache)
    cache.put(KEY, values())
    assert same(RemoteCache("memory://fishers").get(KEY), values())
    assert isinstance(open_cache(f"file://{tmp_path}/x", tmp_path), LocalCache)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://x", "nothing://x"),
        ("s3://user:word@bucket/x", "holds a user name or a password"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_and_no_password_is_repeated(url: str, message: str, tmp_path) -> None:
    with pytest.raises(InputError, match=message) as refused:
        open_cache(url, tmp_path)
    assert "word@" not in str(refused.value)


@pytest.mark.slow
def test_a_server_that_goes_away_in_mid_study_costs_no_trial(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    first.start()
    host, port = first.get_host_and_port()
    for name, text in {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, text)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir("bucket")
    project.write(cache="s3://bucket/fishers")
    assert project.json("run", "spec.yaml", "--trials", "2", "--no-test")["fishers"]["computed"] > 0
    assert len([name for name in objects("s3://bucket/fishers") if name.endswith(".json")]) > 0
    first.stop()
    summary = json.loads((done := project.process("run", "spec.yaml", "--trials", "4", "--no-test", "--json")).stdout)
    assert summary["trials"]["complete"] == 4
    assert f"going on without it for {PAUSE:.0f} s" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret-of-nobody" not in done.stderr + done.stdout


@pytest.mark.slow
def test_two_machines_with_one_shared_cache_compute_each_fisher_once(bucket: str, project: Project) -> None:
    project.write(cache=bucket)
    first = project.json("run", "spec.yaml", "--no-test")
    again = project.json("run", "spec.yaml", "--no-test", "--storage", "sqlite:///another.db")
    assert first["fishers"]["computed"] > 0
    assert (again["fishers"]["computed"], again["best"]) == (0, first["best"])


@pytest.mark.slow
def test_push_and_pull_on_the_command_line(bucket: str, project: Project) -> None:
    project.json("run", "spec.yaml", "--no-test")
    pushed = project.json("cache", "push", "spec.yaml", "--to", bucket)
    assert len(pushed["copied"]) == len(project.json("cache", "ls", "spec.yaml"))
    pulled = project.json("cache", "pull", "spec.yaml", "--cache", "fresh", "--from", bucket)
    assert sorted(pulled["copied"]) == sorted(pushed["copied"])
    assert project.json("cache", "verify", "spec.yaml", "--cache", "fresh")["damaged"] == []
    assert project.cli("cache", "pull", "spec.yaml", "--from", "s3://user:word@b/x", check=2).stdout == ""
    assert len(project.json("cache", "ls", "spec.yaml", "--cache", bucket)) == len(pushed["copied"])


def _hold(file: str, held: Event, over: Event) -> None:
    """Read an entry slowly, as a reader on a slow file system does."""
    import fcntl

    with Path(file).open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        held.set()
        over.wait(60)


def test_a_file_that_another_process_reads_is_not_pruned(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path)
    cache.put(KEY, values())
    cache.put(OTHER, values())
    held, over = context().Event(), context().Event()
    reader = Forked(_hold, str(cache.file_of(KEY.digest)), held, over)
    assert held.wait(60)
    assert cache.prune(0) == [str(cache.file_of(OTHER.digest))]
    over.set()
    assert reader.wait(60) == 0
    assert cache.prune(0) == [str(cache.file_of(KEY.digest))]


def test_a_disk_that_fills_up_costs_the_entry_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    assert Forked(_write_with_little_space, str(tmp_path)).wait(120) == 0
    assert [file.name for file in tmp_path.iterdir()] == [LocalCache(tmp_path).file_of(OTHER.digest).name]


def _write_with_little_space(folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    cache = LocalCache(Path(folder))
    cache.put(KEY, values(size=50_000))  # 1.4 MB
    cache._away_until = 0.0  # the pause is over
    cache.put(OTHER, values())


def test_a_cache_that_failed_is_left_alone_for_a_while_and_then_asked_again(tmp_path: Path, caplog) -> None:
    place = tmp_path / "mount"
    cache: FisherCache = LocalCache(place)
    cache.put(KEY, values())
    place.rename(tmp_path / "away")
    place.write_text("not a folder any more")
    assert cache.get(KEY) is None
    assert "cannot be read" in caplog.text
    place.unlink()
    (tmp_path / "away").rename(place)
    assert cache.get(KEY) is None
    cache._away_until = 0.0
    assert same(cache.get(KEY), values())
