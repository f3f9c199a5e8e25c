"""The model card of an output: README.md with a front matter that the Hub reads.

A card depends only on the files of the source and on the settings, so that equal runs write equal cards: it contains
no times, paths or machines. Licence, language and task of the source's card are copied into its front matter. The
text of the source's card describes another model, and is kept in a file of its own (docs/decisions.md).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import yaml

from pipeline import VERSION
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.sources.hub import hub_id_of, is_hub_id
from pipeline.errors import first_line
from pipeline.settings.bounded_yaml import compose
from swsc_core.compressed.config_json import FORMAT_VERSION

CARD = "README.md"
# Copy of the source's own card.
SOURCE_CARD = "BASE_MODEL_CARD.md"
# Keys of the source's front matter that are copied.
_COPIED_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")
# Largest card that is read, in bytes. The longest ones on the Hub have a tenth of that.
_MAX_BYTES = 1 << 20
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

_USAGE_SWSC = """```python
import swsc_core.hf  # registers the format with transformers (pip install swsc)
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(path)  # this directory, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
```

`swsc restore DIRECTORY DENSE` writes a plain dense checkpoint, which any loader opens.
`swsc evaluate DIRECTORY --text FILE` measures the perplexity."""
_USAGE_DENSE = """The weights are dense, in the layout of the base model, so any loader of that model opens them.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(path)  # this directory, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
```

`swsc evaluate DIRECTORY --text FILE` measures the perplexity."""

FrontMatter = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class SourceCard:
    """The part of a source's card that is copied into the card of an output.

    Attributes:
        data: copied keys of the front matter, and the base model.
        problem: why the front matter could not be read; "" if it could.
    """

    data: FrontMatter = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class MatrixFacts:
    """A compressed matrix: the shape of its dense weight, and the bytes of its compressed form."""

    name: str
    shape: tuple[int, int]
    nbytes: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class CardFacts:
    """The facts that a card states.

    Attributes:
        form: "swsc" or "dense".
        production: how the output was produced, as paragraphs of Markdown.
        matrices: the compressed matrices.
        weights: number of weights of the whole model.
        source_bytes, output_bytes: bytes of all tensors of the source and of the output.
        compact_bytes: bytes of all tensors in format swsc.
        restored: the source is a compressed model, and the output is restored from it.
    """

    form: str
    production: str
    matrices: tuple[MatrixFacts, ...]
    weights: int
    source_bytes: int
    output_bytes: int
    compact_bytes: int
    restored: bool = False


def read_source_card(source: Checkpoint) -> SourceCard:
    """Read the front matter of the source's README.md, and the licence that a GGUF file names."""
    card = _read_front_matter(source)
    licence = {"license": source.dequantized.licence} if source.dequantized and source.dequantized.licence else {}
    return replace(card, data={**licence, **card.data})


def _read_front_matter(source: Checkpoint) -> SourceCard:
    if CARD not in source.extras:
        return SourceCard()
    if (size := source.store.size(CARD)) > _MAX_BYTES:
        return SourceCard(problem=f"{size:,} bytes, more than the limit of {_MAX_BYTES:,}")
    try:
        text = bytes(source.store.read(CARD)).decode("utf-8-sig")
        nodes = front_matter_of(text)
    except ValueError as error:
        return SourceCard(problem=first_line(error))
    keys = (*_COPIED_KEYS, "base_model", "base_model_relation")
    values = {key: _words(_plain_value(nodes.get(key))) for key in keys}
    return SourceCard({key: value for key, value in values.items() if value})


def front_matter_of(card: str) -> dict[str, yaml.Node]:
    """Parse a card's front matter into unconstructed nodes by key; raise ValueError if it has none that can be read."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(card)
    node = compose(block.group(2)) if block else None
    if node is None or not node.value:
        raise ValueError("no front matter")
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("the front matter is not a mapping")
    return {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}


def _plain_value(node: yaml.Node | None) -> object:
    """A text, a list of texts, or False for what YAML reads as such; None for anything else."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain_value(item) if isinstance(item, yaml.ScalarNode) else None for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        return None
    kind = node.tag.rpartition(":")[2]
    if kind == "bool" and node.value.lower() in ("no", "false", "off"):
        return False
    return node.value if kind == "str" else None


def _words(value: object) -> str | list[str] | None:
    """A printable text that is not blank, or a list of such; None for anything else."""
    if isinstance(value, list):
        words = [word for word in map(_words, value) if isinstance(word, str)]
        return words if len(words) == len(value) else None
    if value is False:
        return "no"  # the language code of Norwegian, which YAML reads as a truth value
    return value if isinstance(value, str) and value.strip() and value.isprintable() else None


def make_card(source: Checkpoint, source_card: SourceCard, facts: CardFacts) -> str:
    """Return the text of README.md."""
    from huggingface_hub import ModelCardData

    base = _base_model(source, source_card, facts)
    data = ModelCardData(
        **{key: source_card.data[key] for key in _COPIED_KEYS if key in source_card.data},  # type: ignore[arg-type]
        **base,  # type: ignore[arg-type]
        library_name="transformers",
        tags=["swsc", "compressed"] if facts.form == "swsc" else ["swsc"],
    )
    base_ids = base.get("base_model", "")
    base_id = base_ids if isinstance(base_ids, str) else base_ids[0]
    name = base_id or str(source.config.get("model_type") or "a model")
    link = f"[{base_id}](https://huggingface.co/{base_id})" if base_id else name
    body = "\n\n".join([*_sections(name, link, facts), f"## Base model\n\n{_base_model_text(source, source_card)}"])
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _base_model(source: Checkpoint, source_card: SourceCard, facts: CardFacts) -> FrontMatter:
    """Front matter that names the base model, and how the output relates to it; empty if nothing names it.

    The base model is the Hub id of the source; or else the id that its config.json was saved from; or else the base
    model of the source's own card, with the relation that this card states. For a restored model that card has
    priority.
    """
    carded = source_card.data.get("base_model")
    if carded and all(map(is_hub_id, carded if isinstance(carded, list) else [carded])):
        relation = source_card.data.get("base_model_relation")
        from_card: FrontMatter = {
            "base_model": carded,
            "base_model_relation": relation if isinstance(relation, str) else "quantized",
        }
    else:
        from_card = {}
    saved_from = source.config.get("_name_or_path")
    hub_id = hub_id_of(source.store.root) or (saved_from if is_hub_id(saved_from) else None)
    if not hub_id or (facts.restored and from_card):
        return from_card
    return {"base_model": hub_id, "base_model_relation": "quantized"}


def _sections(name: str, link: str, facts: CardFacts) -> list[str]:
    """Title and sections, without the one about the base model."""
    verb = "restored from its compression" if facts.restored else "compressed"
    return [
        f"# {name.rpartition('/')[2]}, {verb} by SWSC",
        _summary(link, facts),
        _table(facts.matrices),
        _figures(facts),
        f"## Compression\n\n{facts.production}\n\nswsc {VERSION}, format {FORMAT_VERSION}.",
        f"## Usage\n\n{_USAGE_SWSC if facts.form == 'swsc' else _USAGE_DENSE}",
        "## Verification\n\n`swsc verify DIRECTORY` compares the hash of every file with `swsc_manifest.json` and names"
        " files and tensors that differ.",
    ]


def _summary(link: str, facts: CardFacts) -> str:
    count = len(facts.matrices)
    subject, verb = f"{count} {'matrix' if count == 1 else 'matrices'} of {link}", "is" if count == 1 else "are"
    if facts.form == "swsc":
        return (
            f"{subject} {verb} stored in the compressed format of SWSC (shared weights for similar channels). All other"
            " tensors are unchanged."
        )
    return (
        f"{subject} {verb} compressed by SWSC and stored as dense weights, which contain the error of the compression."
        " All other tensors are unchanged."
    )


def _table(matrices: Iterable[MatrixFacts]) -> str:
    """A table with one row for all matrices that have the same shape and the same name but for layer numbers."""
    kinds: dict[tuple[str, tuple[int, int]], list[MatrixFacts]] = {}
    for matrix in sorted(matrices, key=lambda matrix: matrix.name):
        kinds.setdefault((_NUMBER.sub("N", matrix.name), matrix.shape), []).append(matrix)
    rows = [
        f"| `{name}` | {len(members)} | {shape[0]} × {shape[1]} | {bits_of(members):.3f} |"
        for (name, shape), members in kinds.items()
    ]
    return "\n".join(["| compressed | number | shape | stored bits per weight |", "|---|---|---|---|", *rows])


def bits_of(matrices: Iterable[MatrixFacts]) -> float:
    """Stored bits per weight over some matrices."""
    matrices = list(matrices)
    return 8 * sum(matrix.nbytes for matrix in matrices) / sum(matrix.weights for matrix in matrices)


def _figures(facts: CardFacts) -> str:
    share = sum(matrix.weights for matrix in facts.matrices) / facts.weights
    whole_bits = 8 * facts.compact_bytes / facts.weights
    form = "" if facts.form == "swsc" else " in format swsc"
    return (
        f"- Bits per weight{form}: {bits_of(facts.matrices):.3f} over the compressed matrices, {whole_bits:.3f} over"
        " the whole model, counted from stored bytes including labels and scales.\n"
        f"- {share:.1%} of {facts.weights:,} weights are compressed.\n"
        f"- Tensors: {facts.source_bytes:,} bytes before, {facts.output_bytes:,} here."
    )


def _base_model_text(source: Checkpoint, source_card: SourceCard) -> str:
    sentences = []
    if source.dequantized and source.dequantized.baseline:
        sentences.append(
            f"The base model was dequantized from a GGUF file, `{source.dequantized}`. All figures compare with this"
            " baseline, not with the model before its quantization."
        )
    if CARD in source.extras:
        sentences.append(
            f"[{SOURCE_CARD}]({SOURCE_CARD}) is the card of the base model: its purpose, limits and terms. Its figures"
            " were measured before the compression."
        )
    if source_card.problem:
        sentences.append(f"The front matter of that card could not be read ({source_card.problem}).")
    elif "license" not in source_card.data:
        sentences.append("No licence is named in a card of the base model; its own terms apply here as well.")
    else:
        sentences.append("The licence of the base model, named above, applies here as well.")
    return " ".join(sentences)
