"""Whether two locations are one place, by whatever paths they are named."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import OutputError, UserError
from pipeline.storage import paths as places
from pipeline.storage.paths import UserPath, contains, is_hub_blob, links_outside, require_disjoint_paths, user_paths
from pipeline.storage.store import Store


def at(path: object) -> Store:
    return Store.at(str(path))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "data" / "model" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data" / "model")
    (tmp_path / "mnt").symlink_to("data")
    return tmp_path / "data" / "model"


SAME = ["data/model/", "link", "mnt/model", "data/../data/model", "other/../link", "mnt/../data/model", "link/sub/.."]
INSIDE = ["data/model/new", "link/new/deeper", "mnt/model/sub", "link/../model/x"]
OUTSIDE = ["data/model2", "data/mode", "other/model", "data/new", "new/data/model"]


@pytest.mark.parametrize("path", SAME)
def test_one_place_by_another_path_is_known(model: Path, tmp_path: Path, path: str) -> None:
    assert contains(at(model), at(tmp_path / path))
    assert contains(at(f"{tmp_path}/{path}"), at(model))


@pytest.mark.parametrize("path", INSIDE)
def test_a_place_inside_is_known_by_another_path(model: Path, tmp_path: Path, path: str) -> None:
    assert contains(at(model), at(f"{tmp_path}/{path}"))
    assert not contains(at(f"{tmp_path}/{path}"), at(model))


@pytest.mark.parametrize("path", OUTSIDE)
def test_names_that_look_alike_are_not_taken_for_one_place(model: Path, tmp_path: Path, path: str) -> None:
    assert not contains(at(model), at(tmp_path / path))
    assert not contains(at(tmp_path / path), at(model))


def test_places_that_are_yet_to_be_made_are_compared_too(model: Path, tmp_path: Path) -> None:
    assert contains(at(tmp_path / "link" / "out"), at(model / "out" / "cache"))
    assert contains(at(tmp_path / "mnt" / "out"), at(tmp_path / "data" / "out"))
    assert not contains(at(model / "out"), at(model / "out2"))
    assert not contains(at(model / "out" / "cache"), at(model / "out"))


def test_names_that_differ_in_case_are_one_path_on_a_case_insensitive_file_system(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.stat
    shouted = str(model).replace("data/model", "DATA/Model")
    assert not contains(at(model), at(shouted))
    monkeypatch.setattr(
        places.os, "stat", lambda path: real(str(path).replace("DATA/Model", "data/model").replace("DATA", "data"))
    )
    assert contains(at(model), at(shouted))
    assert contains(at(f"{shouted}/new"), at(model / "new" / "x"))
    assert contains(at(shouted), at(model / "new"))


@pytest.fixture
def mounted(model: Path, tmp_path: Path) -> Iterator[Path]:
    """The model again at `whole`, and its folder `sub` again at `part`."""
    points = [(model, tmp_path / "whole"), (model / "sub", tmp_path / "part")]
    done = []
    try:
        for source, point in points:
            point.mkdir()
            if subprocess.run(["mount", "--bind", source, point], capture_output=True).returncode:
                pytest.skip("bind mounts need rights that are not given here; the table of mounts is tested below")
            done.append(point)
        yield tmp_path
    finally:
        for point in done:
            subprocess.run(["umount", point], check=True)


def test_bind_mounts_are_seen_through(mounted: Path, model: Path) -> None:
    assert contains(at(model), at(mounted / "whole"))
    assert contains(at(mounted / "whole"), at(model))
    assert contains(at(model), at(mounted / "whole" / "new"))
    assert contains(at(model), at(mounted / "part"))
    assert contains(at(model), at(mounted / "part" / "new"))
    assert contains(at(mounted / "whole"), at(mounted / "part"))
    assert contains(at(mounted / "part"), at(model / "sub" / "new"))
    assert not contains(at(mounted / "part"), at(model))
    assert not contains(at(mounted / "other"), at(mounted / "whole"))


def test_the_mount_table_reveals_what_inodes_do_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the model is mounted at a path with a blank; parents of the mount point do not contain the model."""
    (tmp_path / "a part").mkdir()
    table = tmp_path / "mountinfo"
    point = f"{tmp_path}/a part".replace(" ", "\\040")
    table.write_text(f"20 1 8:1 / / rw - ext4 /dev/sda1 rw\n21 20 8:1 {model}/sub {point} rw - ext4 /dev/sda1 rw\n")
    assert not contains(at(model), at(tmp_path / "a part" / "new"))
    monkeypatch.setattr(places, "_MOUNT_TABLE", table)
    assert contains(at(model), at(tmp_path / "a part" / "new"))
    assert contains(at(model), at(tmp_path / "a part"))
    assert not contains(at(tmp_path / "other"), at(tmp_path / "a part"))


def test_a_mount_below_a_directory_is_inside_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(f"20 1 8:1 / / rw - ext4 x rw\n21 20 8:1 {tmp_path}/other {model}/sub rw - ext4 x rw\n")
    monkeypatch.setattr(places, "_MOUNT_TABLE", table)
    assert contains(at(model), at(tmp_path / "other" / "new"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("s3://b/x", "s3://b/x/"), ("s3://b/x", "s3://b//x"), ("s3://b/x/y", "s3://b/x//y//"), ("gs://b", "gs://b/"),
        ("s3://b/x", "s3:///b/x"),
    ],
)  # fmt: skip
def test_one_prefix_of_an_object_store_in_two_ways(first: str, second: str) -> None:
    assert contains(at(first), at(second))
    assert contains(at(second), at(first))


def test_prefixes_contain_each_other_at_folders_only() -> None:
    assert contains(at("s3://b"), at("s3://b/x"))
    assert contains(at("s3://b/x"), at("s3://b/x/y"))
    for outer, inner in [("b/x", "b/xy"), ("b/xy", "b/x"), ("b", "bb/x"), ("b/x/y", "b/x"), ("b/X", "b/x")]:
        assert not contains(at(f"s3://{outer}"), at(f"s3://{inner}"))
    assert not contains(at("s3://b/x"), at("gs://b/x"))
    assert not contains(at("s3://b/x"), at("/b/x"))


def test_file_addresses_are_paths(model: Path) -> None:
    for address in (f"file://{model}", f"file://localhost{model}", f"file://{model}/../model/"):
        assert contains(at(address), at(model))
        assert contains(at(model), at(address))


@pytest.mark.parametrize("location", ["", "s3://b/x/../y", "s3://b/./x", "s3://", "s3:///"])
def test_a_location_that_names_no_place_is_refused(location: str) -> None:
    with pytest.raises(UserError):
        Store.at(location)


def test_two_dots_lead_above_what_a_link_leads_to_as_the_system_has_it(model: Path, tmp_path: Path) -> None:
    os.symlink(model / "sub", tmp_path / "deep")
    for path in ("deep/../x", "deep/..", "deep/../../model/./sub/../y"):
        assert at(f"{tmp_path}/{path}").root == os.path.realpath(f"{tmp_path}/{path}")


_NAMES = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=4)


@given(_NAMES, _NAMES)
def test_for_plain_paths_a_place_holds_what_has_its_names_first(first: list[str], second: list[str]) -> None:
    expected = second[: len(first)] == first
    for root in ("/nowhere/", "s3://", "gs://bucket/"):
        assert contains(at(root + "/".join(first)), at(root + "/".join(second))) == expected


class TestRequireApart:
    def refused(self, written: str, other: str, *message: str) -> None:
        with pytest.raises(OutputError) as caught:
            require_disjoint_paths(UserPath.at("OUTPUT", written), [UserPath.at("MODEL", other)])
        assert all(word in str(caught.value) for word in (written, *message))

    def test_all_three_ways_are_refused(self) -> None:
        self.refused("s3://b/x", "s3://b/x", "OUTPUT and MODEL", "same")
        self.refused("s3://b/x/y", "s3://b/x", "OUTPUT", "inside MODEL")
        self.refused("s3://b", "s3://b/x", "MODEL", "inside OUTPUT")

    def test_others_are_not(self) -> None:
        require_disjoint_paths(
            UserPath.at("OUTPUT", "s3://b/y"), [UserPath.at("MODEL", "s3://b/x"), UserPath.at("--text", "/etc/hosts")]
        )

    def test_names_of_data_sets_are_no_places(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(model)
        assert user_paths([("--text", "wikitext2"), ("--calibration", "hf://datasets/a/b"), ("--config", None)]) == []
        require_disjoint_paths(UserPath.at("OUTPUT", "."), user_paths([("--text", "wikitext2")]))
        assert [path.label for path in user_paths([("MODEL", "sub"), ("--text", "s3://b/t")])] == ["MODEL", "--text"]


class TestLinks:
    """Targets of files that are links or are reached through one."""

    def test_a_linked_folder_leads_out_as_a_linked_file_does(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "other" / "secret").write_text("")
        os.symlink(tmp_path / "other", model / "folder")
        os.symlink(tmp_path / "other" / "secret", model / "file")
        os.symlink("sub", model / "inner")
        (model / "sub" / "f").write_text("")
        assert links_outside(at(model), "folder/secret")
        assert links_outside(at(model), "folder")
        assert links_outside(at(model), "file")
        assert not links_outside(at(model), "inner/f")
        assert not links_outside(at(model), "sub/f")
        assert not links_outside(at(tmp_path / "link"), "sub/f")  # the directory itself may be a link

    def test_blobs_of_a_cache_of_the_hub_may_be_led_to_from_any_depth(self, tmp_path: Path) -> None:
        snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
        (snapshot / "sub").mkdir(parents=True)
        blobs.mkdir()
        (blobs / "h1").write_text("")
        (snapshot / "f").symlink_to("../../blobs/h1")
        (snapshot / "sub" / "f").symlink_to("../../../blobs/h1")
        for store, name in [(at(snapshot), "f"), (at(snapshot), "sub/f"), (at(snapshot / "sub"), "f")]:
            assert is_hub_blob(store, name)
            assert not links_outside(store, name)

    def test_a_folder_of_blobs_may_be_a_link_to_a_larger_disk(self, tmp_path: Path) -> None:
        snapshot, disk = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "disk"
        snapshot.mkdir(parents=True)
        disk.mkdir()
        (disk / "h1").write_text("")
        os.symlink(disk, tmp_path / "models--o--n" / "blobs")
        (snapshot / "f").symlink_to("../../blobs/h1")
        assert not links_outside(at(snapshot), "f")

    def test_a_link_to_the_directory_itself_does_not_lead_out(self, model: Path) -> None:
        os.symlink(".", model / "latest")
        os.symlink("..", model / "sub" / "up")
        assert not links_outside(at(model), "latest")
        assert not links_outside(at(model), "sub/up")

    def test_blobs_of_another_model_may_not(self, tmp_path: Path) -> None:
        snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--m" / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir(parents=True)
        (blobs / "h1").write_text("")
        (snapshot / "f").symlink_to("../../../models--o--m/blobs/h1")
        os.symlink("/etc/hosts", tmp_path / "models--o--n" / "blobs")
        (snapshot / "g").symlink_to("../../blobs")
        for name in ("f", "g"):
            assert links_outside(at(snapshot), name)
