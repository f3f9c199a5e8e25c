"""The model card of an output: README.md with a front matter that the Hub understands.

A card is a function of the source's files and of what was done, and of nothing else: no times, no paths, no machines, so that equal
runs write equal cards. What a source's own card says of licence, language and task goes on into the new one; its text is of
another model, with that one's figures, and stays whole in a file of its own (docs/decisions.md).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from pipeline import VERSION
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.sources.hub import hub_id_of, is_hub_id
from pipeline.errors import first_line
from pipeline.settings.bounded_yaml import compose
from swsc_core.compressed.config_json import FORMAT_VERSION

CARD = "README.md"
SOURCE_CARD = "BASE_MODEL_CARD.md"  # the source's own card, byte for byte
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_MOST = 1 << 20  # bytes of a card that are read: the longest real ones have a tenth of that
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

_LOAD_SWSC = """```python
import swsc_core.hf  # lets transformers open the format (pip install swsc)
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(place)  # this directory, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(place)
```

`swsc restore DIRECTORY DENSE` makes a plain dense checkpoint of it, which any loader opens; `swsc evaluate DIRECTORY --text FILE`
measures its perplexity."""
_LOAD_DENSE = """The weights are dense, in the layout of the model that was compressed: any loader of it opens them.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(place)  # this directory, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(place)
```

`swsc evaluate DIRECTORY --text FILE` measures its perplexity."""


@dataclass(frozen=True)
class SourceCard:
    """What the card of a source says, as far as it goes on into that of an output; `problem`: why it could not be read."""

    data: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Compressed:
    """One matrix that was compressed: shape of the dense one, bytes of its compact form."""

    name: str
    shape: tuple[int, int]
    nbytes: int

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class About:
    """What a card tells.

    Attributes:
        form: "swsc" or "dense".
        how: how it was made, as paragraphs of Markdown.
        weights: of the whole model.
        before, after: bytes of all tensors, of the source and here.
        compact: bytes that all tensors have in the compact form.
        restored: the source is the compressed model, and this one was made dense again.
    """

    form: str
    how: str
    matrices: tuple[Compressed, ...]
    weights: int
    before: int
    after: int
    compact: int
    restored: bool = False


def read_source_card(source: Checkpoint) -> SourceCard:
    """The front matter of the source's README.md, and the licence that a GGUF file names; a `problem` if it cannot be read."""
    found = _front_matter(source)
    licence = {"license": source.dequantized.licence} if source.dequantized and source.dequantized.licence else {}
    return replace(found, data=licence | dict(found.data))


def _front_matter(source: Checkpoint) -> SourceCard:
    if CARD not in source.extras:
        return SourceCard()
    if (size := source.store.size(CARD)) > _MOST:
        return SourceCard(problem=f"{size:,} bytes, at most {_MOST:,} are read")
    try:
        text = bytes(source.store.read(CARD)).decode("utf-8-sig")
        data = front_matter_of(text)
    except ValueError as error:
        return SourceCard(problem=first_line(error))
    found = {key: _words(_plain(data.get(key))) for key in (*_CARRIED, "base_model", "base_model_relation")}
    return SourceCard({key: value for key, value in found.items() if value})


def front_matter_of(card: str) -> dict[str, yaml.Node]:
    """Key -> value of a card's front matter, as nodes of which nothing is made yet; ValueError if it has none that can be read."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(card)
    node = compose(block.group(2)) if block else None
    if node is None or not node.value:
        raise ValueError("no front matter")
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("repo card metadata block should be a dict")
    return {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}


def _plain(node: yaml.Node | None) -> object:
    """A word, a list of such, False for what YAML takes for it; None for anything else."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(one) if isinstance(one, yaml.ScalarNode) else None for one in node.value]
    if not isinstance(node, yaml.ScalarNode):
        return None
    kind = node.tag.rpartition(":")[2]
    if kind == "bool" and node.value.lower() in ("no", "false", "off"):
        return False
    return node.value if kind == "str" else None


def _words(value: object) -> str | list[str] | None:
    """A word or a list of words; None for anything else, an empty one among it, which no card may hold there."""
    if isinstance(value, list):
        words = [word for word in map(_words, value) if isinstance(word, str)]
        return words if len(words) == len(value) else None
    if value is False:
        return "no"  # Norwegian: YAML takes the bare word for a truth value
    return value if isinstance(value, str) and value.strip() and value.isprintable() else None


def make_card(source: Checkpoint, own: SourceCard, about: About) -> str:
    """The text of README.md."""
    from huggingface_hub import ModelCardData

    base = _base(source, own, about)
    data = ModelCardData(
        **{key: own.data[key] for key in _CARRIED if key in own.data},
        **base,
        library_name="transformers",
        tags=["swsc", "compressed"] if about.form == "swsc" else ["swsc"],
    )
    name = _first(base.get("base_model")) or str(source.config.get("model_type") or "a model")
    body = _body(name, "base_model" in base, source, own, about)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _base(source: Checkpoint, own: SourceCard, about: About) -> dict[str, Any]:
    """The model that was compressed and how this one relates to it, as far as anything names it.

    Its Hub id if it was had by it; else what its config was saved from; else what its card is based on, in that card's own relation.
    Of a compressed model that is made dense again, the card says best what was compressed.
    """
    carried = own.data.get("base_model")
    if carried and all(map(is_hub_id, carried if isinstance(carried, list) else [carried])):
        relation = own.data.get("base_model_relation")
        named = {"base_model": carried, "base_model_relation": relation if isinstance(relation, str) else "quantized"}
    else:
        named = {}
    saved = source.config.get("_name_or_path")
    found = hub_id_of(source.store.root) or (saved if is_hub_id(saved) else None)
    if not found or (about.restored and named):
        return named
    return {"base_model": found, "base_model_relation": "quantized"}


def _first(value: str | list[str] | None) -> str:
    return (value[0] if isinstance(value, list) else value) or ""


def _body(name: str, is_id: bool, source: Checkpoint, own: SourceCard, about: About) -> str:
    known = f"[{name}](https://huggingface.co/{name})" if is_id else name
    what = "dense again after compression" if about.restored else "compressed"
    parts = [
        f"# {name.rpartition('/')[2]}, {what} by SWSC",
        _summary(known, about),
        _table(about.matrices),
        _figures(about),
        f"## How it was made\n\n{about.how}\n\nswsc {VERSION}, format {FORMAT_VERSION}.",
        f"## Load it\n\n{_LOAD_SWSC if about.form == 'swsc' else _LOAD_DENSE}",
        "## Verify it\n\n`swsc verify DIRECTORY` hashes every file against `swsc_manifest.json` and names the file and tensor that differs.",
        f"## The model that was compressed\n\n{_original(source, own)}",
    ]
    return "\n\n".join(parts)


def _summary(known: str, about: About) -> str:
    number = f"{len(about.matrices)} {'matrix' if len(about.matrices) == 1 else 'matrices'}"
    if about.form == "swsc":
        return f"{number} of {known} stored in the compact form of SWSC (shared weights for similar channels); all others as they were."
    return f"{number} of {known} compressed and stored dense again, with the errors that this has made; all others as they were."


def _table(matrices: tuple[Compressed, ...]) -> str:
    """A row for matrices whose names are alike but for numbers and whose shapes are the same."""
    kinds: dict[tuple[str, tuple[int, int]], list[Compressed]] = {}
    for matrix in sorted(matrices, key=lambda one: one.name):
        kinds.setdefault((_NUMBER.sub("N", matrix.name), matrix.shape), []).append(matrix)
    rows = [
        f"| `{kind}` | {len(own)} | {shape[0]} × {shape[1]} | {bits_of(own):.3f} |"
        for (kind, shape), own in kinds.items()
    ]
    return "\n".join(["| compressed | number | shape | true bits a weight |", "|---|---|---|---|", *rows])


def bits_of(matrices: list[Compressed] | tuple[Compressed, ...]) -> float:
    """Stored bits a weight over some matrices."""
    return 8 * sum(one.nbytes for one in matrices) / sum(one.weights for one in matrices)


def _figures(about: About) -> str:
    share = sum(one.weights for one in about.matrices) / about.weights
    compact = "" if about.form == "swsc" else ", in the compact form"
    return (
        f"- Bits a weight{compact}: {bits_of(about.matrices):.3f} over the compressed matrices, {8 * about.compact / about.weights:.3f} over the whole"
        " model; counted from stored bytes, labels and scales included.\n"
        f"- {share:.1%} of {about.weights:,} weights are compressed.\n"
        f"- Tensors: {about.before:,} bytes before, {about.after:,} here."
    )


def _original(source: Checkpoint, own: SourceCard) -> str:
    lines = []
    if source.dequantized and source.dequantized.baseline:
        lines.append(
            f"It was dequantized from a GGUF file, `{source.dequantized}`: figures are those of this baseline, not of the model that"
            " was quantized."
        )
    if CARD in source.extras:
        lines.append(
            f"Its own card is kept in [{SOURCE_CARD}]({SOURCE_CARD}): what it is for, its limits, its terms. Figures there are those of"
            " the model before it was compressed."
        )
    if own.problem:
        lines.append(f"Nothing could be carried over from that card's front matter ({own.problem}).")
    elif "license" not in own.data:
        lines.append("No card of it names a licence; its own terms hold here, too.")
    else:
        lines.append("Its licence holds here, too, and is named above.")
    return " ".join(lines)
