"""docs/format.md says what is stored: its example is decoded as it stands there."""

import json
import re
from pathlib import Path

import pytest
import torch

from swsc_core import decode
from swsc_core.format import FORMAT_VERSION, entries_of, part_name, quantization_config
from swsc_core.packing import pack

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
EXAMPLE = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])  # type: ignore[index]


def test_the_example_of_the_page_is_decoded_to_what_it_says() -> None:
    parts = {name: torch.tensor(values, dtype=torch.float32) for name, values in EXAMPLE["parts"].items()}
    parts["labels"] = parts["labels"].to(torch.uint8)
    assert decode(parts, EXAMPLE["entry"]).tolist() == EXAMPLE["restored"]


def test_the_labels_of_the_page_are_packed_as_it_says() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    assert pack(labels, 1).tolist() == [6]
    assert pack(labels, 2).tolist() == [20]


def test_the_page_says_the_present_version() -> None:
    assert f'"format_version": {FORMAT_VERSION}' in PAGE


def test_what_is_written_is_read_as_it_was() -> None:
    entries = {"a.weight": EXAMPLE["entry"]}
    assert entries_of(quantization_config(entries)) == entries


def test_an_entry_of_the_first_version_means_whole_channels() -> None:
    first = {"method": "swsc", "shape": [4, 8], "dtype": "float32", "n_clusters": 2, "rank": 1}
    said = {axis: {"w": first | {"channel_axis": axis}} for axis in ("output", "input")}
    read = {axis: entries_of({"format_version": 1, "tensors": entries})["w"] for axis, entries in said.items()}
    assert [read[axis]["segment_size"] for axis in ("output", "input")] == [8, 4]
    assert read["output"]["codebooks"] == 1


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, None, "2"])
def test_a_version_that_is_not_known_is_refused_with_the_remedy(version: object) -> None:
    with pytest.raises(ValueError, match=f"this release reads 1 to {FORMAT_VERSION}; update swsc"):
        entries_of({"format_version": version, "tensors": {}})


def test_parts_stand_beside_the_tensor_that_they_replace() -> None:
    assert part_name("a.q_proj.weight", "weight") == "a.q_proj.weight"
    assert part_name("a.q_proj.weight", "left") == "a.q_proj.left"
    assert part_name("experts", "labels") == "experts.labels"
