import json
import os
import tarfile

import pytest

from diffdfkd.engine import shards
from diffdfkd.engine.shards import DamagedShard, Sample


def samples(start=0, count=3):
    return [Sample(f"000-{i:08d}", b"image %d" % i, {"class": i % 2, "sample": i}) for i in range(start, start + count)]


def write(root, index=0, content=None, **choices):
    content = samples() if content is None else content
    folder = shards.round_folder(root, 0)
    return shards.write_shard(folder, index, content, round=0, digest="d", choices={"steps": 3, **choices})


def content(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_same_samples_give_the_same_bytes_at_any_time(tmp_path):
    for root in (tmp_path / "a", tmp_path / "b"):
        write(root)
        shards.write_manifest(root, 1)
        os.utime(tmp_path, (1, 1))
    first, second = content(tmp_path / "a"), content(tmp_path / "b")
    assert first == second
    assert sorted(map(str, first)) == ["manifest.jsonl", "round-000/shard-00000.json", "round-000/shard-00000.tar"]


def test_tar_holds_no_trace_of_its_maker(tmp_path):
    write(tmp_path)
    with tarfile.open(tmp_path / "round-000" / "shard-00000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        f"000-{i:08d}.{extension}" for i in range(3) for extension in ("png", "json")
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_webdataset_and_tarfile_read_a_shard(tmp_path):
    import webdataset

    write(tmp_path)
    path = tmp_path / "round-000" / "shard-00000.tar"
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [(item["__key__"], item["png"], json.loads(item["json"])["sample"]) for item in read] == [
        (sample.key, sample.image, sample.record["sample"]) for sample in samples()
    ]
    with tarfile.open(path) as tar:
        assert tar.extractfile("000-00000001.png").read() == b"image 1"


def test_dropped_samples_are_counted_and_left_out(tmp_path):
    one, _, three = samples()
    sidecar = write(tmp_path, content=[one, None, three])
    assert (sidecar.images, sidecar.dropped) == (2, 1)
    assert shards.verify_shard(tmp_path / "round-000" / "shard-00000.tar") == sidecar


def test_nothing_is_published_when_the_samples_fail(tmp_path):
    def failing():
        yield samples()[0]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write(tmp_path, content=failing())
    assert content(tmp_path) == {}


def flip(path):
    damaged = bytearray(path.read_bytes())
    damaged[600] ^= 1
    path.write_bytes(damaged)


DAMAGES = {
    "truncated": (lambda tar: tar.write_bytes(tar.read_bytes()[:-100]), "bytes, its sidecar says"),
    "flipped": (flip, "differs from the digest"),
    "no tar": (lambda tar: tar.unlink(), r"shard-00000\.tar is missing"),
    "no sidecar": (lambda tar: tar.with_suffix(".json").unlink(), r"shard-00000\.json is missing"),
    "torn sidecar": (lambda tar: tar.with_suffix(".json").write_bytes(b'{"version":1,'), "not a sidecar"),
    "foreign sidecar": (lambda tar: tar.with_suffix(".json").write_text("{}"), "not a sidecar"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(tmp_path, damage):
    write(tmp_path)
    act, reason = DAMAGES[damage]
    tar = tmp_path / "round-000" / "shard-00000.tar"
    act(tar)
    with pytest.raises(DamagedShard, match=reason):
        shards.verify_shard(tar)


def test_swapped_shards_are_found(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, samples(3))
    folder = tmp_path / "round-000"
    for suffix in ("tar", "json"):
        (folder / f"shard-00001.{suffix}").rename(folder / f"shard-00000.{suffix}")
    with pytest.raises(DamagedShard, match="belongs to"):
        shards.verify_shard(folder / "shard-00000.tar")


def test_manifest_follows_the_sidecars(tmp_path):
    write(tmp_path, 1, samples(3, 2))
    write(tmp_path, 0)
    lines = [json.loads(line) for line in shards.write_manifest(tmp_path, 1).read_text().splitlines()]
    assert [(line["shard"], line["images"]) for line in lines] == [
        ("round-000/shard-00000.tar", 3),
        ("round-000/shard-00001.tar", 2),
    ]
    assert [line["sha256"] for line in lines] == [sidecar.sha256 for sidecar in shards.list_shards(tmp_path, 0)]


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    shards.write_atomic(path, b"old")
    with pytest.raises(KeyboardInterrupt), shards.atomic_file(path) as stream:
        stream.write(b"half of the ne")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path):
    write(tmp_path)
    (tmp_path / "round-000" / ".another-program.tmp").write_bytes(b"whole")
    before = content(tmp_path)
    (tmp_path / "round-000" / ".shard-00001.tar.123-0123abcd.tmp").write_bytes(b"half")
    assert shards.remove_temporary(tmp_path) == 1
    assert content(tmp_path) == before
