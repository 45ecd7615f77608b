"""The Fisher cache: identity, atomicity, damage, size."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from dfmerge_studies.importance.cache import FisherKey, LocalCache, load_fisher, save_fisher
from tests.processes import Forked

KEY = FisherKey(
    base="b" * 64,
    expert="e" * 64,
    expert_name="red",
    coefficient=(0.3).hex(),
    estimator="exact",
    inputs="d" * 64,
    indices={"red": [3, 1, 2]},
    seed=None,
    parameters="p" * 64,
    compute_dtype="float32",
    dtype="float32",
)
OTHERS = {
    "base": "x" * 64,
    "expert": "x" * 64,
    "coefficient": (0.30000000000000004).hex(),
    "estimator": "empirical",
    "inputs": "x" * 64,
    "indices": {"red": [1, 2, 3]},
    "seed": 1,
    "parameters": "x" * 64,
    "compute_dtype": "bfloat16",
    "dtype": "bfloat16",
    "format_version": 99,
}


def values(seed: int = 0, size: int = 100) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.rand(size, 7, generator=generator), "b": torch.rand(3, generator=generator)}


def same(left: dict[str, torch.Tensor] | None, right: dict[str, torch.Tensor]) -> bool:
    return left is not None and left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in right)


@pytest.fixture
def cache(tmp_path: Path) -> LocalCache:
    return LocalCache(tmp_path / "fishers")


def test_what_was_put_is_got_exactly(cache):
    assert cache.get(KEY) is None
    cache.put(KEY, values())
    assert same(cache.get(KEY), values())


def test_bfloat16_values_survive(cache):
    stored = {name: tensor.bfloat16() for name, tensor in values().items()}
    cache.put(KEY, stored)
    assert same(cache.get(KEY), stored)


@pytest.mark.parametrize("field", OTHERS)
def test_every_part_of_the_key_counts(cache, field):
    cache.put(KEY, values())
    assert cache.get(dataclasses.replace(KEY, **{field: OTHERS[field]})) is None


def test_the_name_of_an_expert_does_not_count(cache):
    cache.put(KEY, values())
    assert same(cache.get(dataclasses.replace(KEY, expert_name="another")), values())


def test_the_key_is_readable_in_the_metadata(cache):
    cache.put(KEY, values())
    _, metadata = load_fisher(cache.file_of(KEY.digest))
    assert metadata["expert_name"] == "red"
    assert float.fromhex(metadata["coefficient"]) == 0.3
    assert metadata["indices"] == '{"red": [3, 1, 2]}'


def _flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-10], lambda data: data[:20], lambda data: b"", lambda data: data + b"more", _flip],
    ids=["truncated", "header only", "empty", "trailing bytes", "one bit flipped"],
)
def test_a_damaged_file_is_set_aside_said_so_and_never_used(cache, caplog, damage):
    cache.put(KEY, values())
    file = cache.file_of(KEY.digest)
    file.write_bytes(damage(file.read_bytes()))
    assert cache.get(KEY) is None
    assert "damaged" in caplog.text
    assert not file.exists()
    assert len(list(cache.folder.glob("*.damaged-*"))) == 1
    cache.put(KEY, values())
    assert same(cache.get(KEY), values())


def test_verify_finds_damage_and_leaves_the_rest(cache):
    other = dataclasses.replace(KEY, expert="x" * 64)
    cache.put(KEY, values(1))
    cache.put(other, values(2))
    file = cache.file_of(KEY.digest)
    file.write_bytes(_flip(file.read_bytes()))
    damaged = cache.verify()
    assert [aside.startswith(str(file)) for aside, _ in damaged] == [True]
    assert same(cache.get(other), values(2))


def test_prune_removes_the_least_recently_used_first(cache):
    keys = [dataclasses.replace(KEY, expert=str(i) * 64) for i in range(4)]
    for age, key in enumerate(keys):
        cache.put(key, values(age))
        os.utime(cache.file_of(key.digest), (1000 + age, 1000 + age))
    cache.get(keys[0])  # used just now
    size = cache.file_of(keys[0].digest).stat().st_size
    deleted = cache.prune(2 * size)
    assert deleted == [str(cache.file_of(key.digest)) for key in keys[1:3]]
    assert same(cache.get(keys[0]), values(0))


def test_a_limit_keeps_the_cache_small_and_the_newest_entry_in_it(tmp_path):
    cache = LocalCache(tmp_path, limit=1)
    for i in range(3):
        key = dataclasses.replace(KEY, expert=str(i) * 64)
        cache.put(key, values(i))
        assert [entry.digest for entry in cache.entries()] == [key.digest]


def test_a_cache_that_cannot_be_written_costs_the_entry_and_not_the_trial(tmp_path, caplog):
    (tmp_path / "fishers").write_text("a file where the folder should be")
    cache = LocalCache(tmp_path / "fishers" / "below")
    cache.put(KEY, values())
    assert "going on without" in caplog.text


def test_a_failed_write_leaves_no_temporary_file(tmp_path):
    target = tmp_path / "taken"
    (target / "not empty").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        save_fisher(target, values(), {})
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def _write_many(folder: str, times: int) -> None:
    cache = LocalCache(Path(folder))
    for _ in range(times):
        cache.put(KEY, values(size=2000))


def test_an_entry_may_be_read_by_whom_any_new_file_may_be(cache, tmp_path):
    cache.put(KEY, values())
    (tmp_path / "new").touch()
    assert cache.file_of(KEY.digest).stat().st_mode == (tmp_path / "new").stat().st_mode


def test_two_writers_of_one_key_leave_one_valid_entry_and_readers_never_see_half_a_file(cache):
    cache.put(KEY, values(size=2000))
    writers = [Forked(_write_many, str(cache.folder), 20) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        assert same(cache.get(KEY), values(size=2000))
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [file.name for file in cache.folder.iterdir()] == [cache.file_of(KEY.digest).name]
