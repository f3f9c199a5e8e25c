"""docs/format.md documents the format: its example is decoded as printed there."""

import json
import re

import pytest
import torch

from swsc_core import decode
from swsc_core.compressed.config_json import FORMAT_VERSION, entries_of, part_name, quantization_config
from swsc_core.compressed.entry import SwscEntry
from swsc_core.compressed.registry import entry_of
from swsc_core.storage.packing import pack
from tests.support.project import ROOT

PAGE = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
RTN = {"method": "rtn", "shape": [4, 4], "dtype": "float32", "bits": 4, "granularity": "channel", "symmetric": False}
FUSED = {"tensor": "b.weight", "rows": [0, 4, 4, 1]}
EXAMPLE = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])  # type: ignore[index]


def test_the_example_of_the_page_is_decoded_to_its_stated_weight() -> None:
    parts = {name: torch.tensor(values, dtype=torch.float32) for name, values in EXAMPLE["parts"].items()}
    parts["labels"] = parts["labels"].to(torch.uint8)
    assert decode(parts, entry_of(EXAMPLE["entry"])).tolist() == EXAMPLE["restored"]


def test_the_labels_of_the_page_are_packed_as_documented() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    assert pack(labels, 1).tolist() == [6]
    assert pack(labels, 2).tolist() == [20]


def test_the_page_names_the_present_version() -> None:
    assert f'"format_version": {FORMAT_VERSION}' in PAGE


def test_what_is_written_is_read_as_it_was() -> None:
    groups, fused = {**RTN, "granularity": "group", "group_size": 2}, {**RTN, "transposed": True, **FUSED}
    objects = {"a.weight": EXAMPLE["entry"], "b.weight": groups, "c.q.weight": fused}
    entries = {name: entry_of(value) for name, value in objects.items()}
    written = quantization_config(entries)
    assert entries_of(json.loads(json.dumps(written))) == entries
    assert written["tensors"] == objects


def test_an_entry_of_the_first_version_means_whole_channels() -> None:
    first = {"method": "swsc", "shape": [4, 8], "dtype": "float32", "n_clusters": 2, "rank": 1}
    entry_of_axis = {axis: {"w": first | {"channel_axis": axis}} for axis in ("output", "input")}
    read = {axis: entries_of({"format_version": 1, "tensors": entries})["w"] for axis, entries in entry_of_axis.items()}
    assert [entry.layout.size for entry in read.values() if isinstance(entry, SwscEntry)] == [8, 4]
    assert read["output"].to_json() == entry_of_axis["output"]["w"] | {
        "segment_size": 8, "codebooks": 1, "scaled": False, "centroid_bits": None, "factor_bits": None,
    }  # fmt: skip


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, None, "2", True])
def test_a_version_that_is_not_known_is_refused_with_the_remedy(version: object) -> None:
    with pytest.raises(ValueError, match=f"this release reads 1 to {FORMAT_VERSION}"):
        entries_of({"format_version": version, "tensors": {}})


def test_parts_stand_beside_the_tensor_that_they_replace() -> None:
    assert part_name("a.q_proj.weight", "weight") == "a.q_proj.weight"
    assert part_name("a.q_proj.weight", "left") == "a.q_proj.left"
    assert part_name("experts", "labels") == "experts.labels"


def read(entries: object) -> None:
    entries_of({"format_version": FORMAT_VERSION, "tensors": entries})


class TestDamagedEntries:
    """config.json may come from anywhere: each value of an entry is looked at before anything is made of it."""

    @pytest.mark.parametrize("key", EXAMPLE["entry"])
    @pytest.mark.parametrize("odd", ["magic", -1, 1.5, [], [4], [-4, -4], {}, float("inf"), "gone"])
    def test_a_value_that_cannot_be_is_refused_with_the_tensor_and_the_key(self, key: str, odd: object) -> None:
        entry = {**EXAMPLE["entry"], key: odd}
        if odd == "gone":
            del entry[key]
        with pytest.raises(ValueError, match=rf"a\.q\.weight: its entry .* is damaged \({key} .*\)"):
            read({"a.q.weight": entry})

    @pytest.mark.parametrize(
        ("key", "odd"), [("bits", 9), ("bits", "4"), ("granularity", "row"), ("group_size", 0), ("symmetric", 0)]
    )
    def test_of_rounded_ones_too(self, key: str, odd: object) -> None:
        read({"a": RTN})
        with pytest.raises(ValueError, match=rf"damaged \({key} is "):
            read({"a": {**RTN, key: odd}})
        with pytest.raises(ValueError, match="group_size is missing"):
            read({"a": {**RTN, "granularity": "group"}})

    @pytest.mark.parametrize(
        ("piece", "key"),
        [
            ({"tensor": "b.weight"}, "tensor.*rows"),
            ({"rows": [0, 4, 4, 1]}, "tensor.*rows"),
            ({"tensor": "b.weight", "rows": [0, 1, 1, 1 << 40]}, "rows.* shape"),
            ({"tensor": "b.weight", "rows": [0, 4, 4]}, "rows is "),
            ({"tensor": "b.weight", "rows": [0.0, 4, 4, 1]}, "rows is "),
            ({"tensor": ["b.weight"], "rows": [0, 4, 4, 1]}, "tensor is "),
            ({"transposed": "yes"}, "transposed is "),
            ({"stacked": 2}, "rows"),
            ({"stacked": 0, "tensor": "b.weight", "rows": [0, 4, 4, 1]}, "stacked is "),
        ],
    )
    def test_so_are_pieces_that_cannot_be(self, piece: dict[str, object], key: str) -> None:
        with pytest.raises(ValueError, match=f"a: its entry .*{key}"):
            read({"a": {**EXAMPLE["entry"], **piece}})

    @pytest.mark.parametrize("entries", [None, 7, "magic", [], ["a"], {"a": None}, {"a": [1]}])
    def test_so_is_what_is_no_table(self, entries: object) -> None:
        with pytest.raises(ValueError, match="not an object"):
            read(entries)

    @pytest.mark.parametrize("shape", [None, 4, "44", [], [4], {}])
    def test_so_are_shapes_of_the_first_version(self, shape: object) -> None:
        first = {"method": "swsc", "shape": shape, "dtype": "float32", "n_clusters": 2, "rank": 1}
        with pytest.raises(ValueError, match="shape is"):
            entries_of({"format_version": 1, "tensors": {"a": first}})
