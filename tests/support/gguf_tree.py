"""A GGUF file as a tree of its fields, in which a few fields are changed before it is written again.

Random changes of bytes mostly break the framing of the file, which is refused at once. Here the framing is intact, and
the values of fields are wrong.
"""

import copy
import math
import struct
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# types of values; 13 is not defined
_TYPES = st.one_of(st.integers(0, 13), st.just(2**32 - 1))
# tensor types of llama.cpp, some of which were removed
_TENSOR_TYPES = st.one_of(st.integers(0, 42), st.just(2**32 - 1))
_SMALL = [0, 1, 2, 3, 7, 31, 32, 63, 127, 128, 255, 256, 1000, 9999, -1]
_POWERS = [2**16, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]
_ODD = st.sampled_from([*_SMALL, *_POWERS, 0.0, 0.5, 1e-300, 1e300, float("nan"), float("inf"), True])
_STRINGS = ["", "llama", "gpt2", "bert", "t5", "\0", "é", "x" * 70_000, "{{", "<unk>", "../x", "none", "linear"]
_TEXTS = st.one_of(st.sampled_from(_STRINGS), st.text(max_size=6))
_KEY_NAMES = """
general.architecture general.alignment general.file_type general.name general.license general.quantization_version
llama.block_count llama.context_length llama.embedding_length llama.feed_forward_length llama.vocab_size
llama.attention.head_count llama.attention.head_count_kv llama.attention.key_length llama.attention.value_length
llama.attention.layer_norm_rms_epsilon llama.rope.dimension_count llama.rope.freq_base llama.rope.scaling.type
llama.rope.scaling.factor llama.expert_count llama.expert_used_count llama.attention.sliding_window split.count split.no
split.tensors.count tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens tokenizer.ggml.scores
tokenizer.ggml.token_type tokenizer.ggml.merges tokenizer.ggml.bos_token_id tokenizer.ggml.unknown_token_id
tokenizer.ggml.padding_token_id tokenizer.ggml.add_bos_token tokenizer.ggml.added_tokens tokenizer.chat_template
"""
_ARCHITECTURE_NAMES = """
llama mistral qwen2 qwen2moe qwen2_moe qwen3 qwen3moe falcon bloom gpt2 gpt-oss mamba nemotron gemma gemma2 gemma3 phi3
stablelm starcoder2 t5 t5encoder umt5 deci lfm2 lfm2moe clip bert
"""
_KNOWN, ARCHITECTURES = _KEY_NAMES.split(), _ARCHITECTURE_NAMES.split()


@dataclass
class Array:
    """Values of one type.

    Attributes:
        kind: type of the values.
        values: the values.
        stated_count: number of values that the header states; None for the true one.
    """

    kind: int
    values: list[Any]
    stated_count: int | None = None


@dataclass
class Key:
    """A key of the header, the type that the header states, and the value."""

    name: str
    kind: int
    value: Any


@dataclass
class Tensor:
    """What the header states about a tensor."""

    name: str
    dims: list[int]
    kind: int
    offset: int


@dataclass
class Tree:
    """A file.

    Attributes:
        keys, tensors: the entries of the header.
        data: bytes of the tensors.
        alignment: alignment of the tensors in the file.
        version: version of the format.
        stated_keys, stated_tensors: counts that the header states; None for the true ones.
        order: byte order, as in `struct`.
    """

    keys: list[Key]
    tensors: list[Tensor]
    data: bytes
    alignment: int = 32
    version: int = 3
    stated_keys: int | None = None
    stated_tensors: int | None = None
    order: str = field(default="<")


def parsed(content: bytes) -> Tree:
    """The tree of a valid file: little-endian, version 3."""
    import io

    file = io.BytesIO(content)
    number = lambda kind: struct.unpack("<" + kind, file.read(struct.calcsize("<" + kind)))[0]  # noqa: E731
    text = lambda: file.read(number("Q")).decode()  # noqa: E731

    def value(kind: int) -> Any:
        if kind == _ARRAY:
            inner, count = number("I"), number("Q")
            return Array(inner, [value(inner) for _ in range(count)])
        return text() if kind == _STRING else number(_SCALARS[kind])

    file.read(8)
    n_tensors, n_keys = number("Q"), number("Q")
    keys = [Key(text(), kind := number("I"), value(kind)) for _ in range(n_keys)]
    tensors = [
        Tensor(text(), [number("Q") for _ in range(number("I"))], number("I"), number("Q")) for _ in range(n_tensors)
    ]
    return Tree(keys, tensors, content[-(-file.tell() // 32) * 32 :])


def written(tree: Tree) -> bytes:
    """The file whose fields are those of the tree."""
    head = b"GGUF" + _number(tree, 4, tree.version)
    counts = (tree.stated_tensors, tree.tensors), (tree.stated_keys, tree.keys)
    head += b"".join(_number(tree, 10, len(entries) if stated is None else stated) for stated, entries in counts)
    for key in tree.keys:
        head += _text(tree, key.name) + _number(tree, 4, key.kind) + _value(tree, key.kind, key.value)
    for tensor in tree.tensors:
        head += _text(tree, tensor.name) + _number(tree, 4, len(tensor.dims))
        head += b"".join(_number(tree, 10, dim) for dim in tensor.dims)
        head += _number(tree, 4, tensor.kind) + _number(tree, 10, tensor.offset)
    return head + b"\0" * (-len(head) % max(1, tree.alignment)) + tree.data


def _text(tree: Tree, text: str) -> bytes:
    content = text.encode(errors="surrogatepass")
    return _number(tree, 10, len(content)) + content


def _number(tree: Tree, kind: int, value: Any) -> bytes:
    """A scalar: the lowest bits of a number that is too large, and the length of a value that is not a number."""
    letter = _SCALARS[kind]
    value = value if isinstance(value, int | float) else len(value.values if isinstance(value, Array) else value)
    if letter in "fd":
        value = float(value)
        return struct.pack(tree.order + letter, value if letter == "d" or abs(value) < 3e38 else math.inf)
    size = struct.calcsize(letter)
    whole = int(value) if math.isfinite(value) else 2**31
    return (whole % (1 << 8 * size)).to_bytes(size, "little" if tree.order == "<" else "big")


def _value(tree: Tree, kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _text(tree, value if isinstance(value, str) else str(value)[:100])
    if kind == _ARRAY:
        array = value if isinstance(value, Array) else Array(8 if isinstance(value, str) else 4, [value])
        count = len(array.values) if array.stated_count is None else array.stated_count
        inner = b"".join(_value(tree, array.kind, element) for element in array.values)
        return _number(tree, 4, array.kind) + _number(tree, 10, count) + inner
    return _number(tree, kind, value) if kind in _SCALARS else b"\0" * 8


@st.composite
def changed_gguf(draw: Any, tree: Tree) -> bytes:
    """A GGUF file in which one to three fields are wrong."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        change = draw(
            st.sampled_from(
                [
                    _change_value,
                    _change_value,
                    _change_array,
                    _change_keys,
                    _change_tensor,
                    _change_tensor,
                    _change_file,
                ]
            )
        )
        change(draw, tree)
    return written(tree)


def _change_value(draw: Any, tree: Tree) -> None:
    """Another value of a key, of its type or of another type."""
    if not tree.keys:
        return
    key = draw(st.sampled_from(tree.keys))
    if draw(st.booleans()):
        key.kind = draw(_TYPES)
    if key.kind != _ARRAY:
        texts = st.sampled_from(ARCHITECTURES) if key.name == "general.architecture" else _TEXTS
        key.value = draw(texts if key.kind == _STRING else _ODD)


def _change_array(draw: Any, tree: Tree) -> None:
    """Another type of elements, another number of elements (stated or real), or another element."""
    arrays = [key.value for key in tree.keys if isinstance(key.value, Array)]
    if not arrays:
        return
    array = draw(st.sampled_from(arrays))
    kind = draw(st.sampled_from(["kind", "count", "fewer", "more", "element", "nested"]))
    if kind == "kind":
        array.kind = draw(_TYPES)
    elif kind == "count":
        array.stated_count = draw(
            st.sampled_from([0, 1, len(array.values) - 1, len(array.values) + 1, 2**22, 2**31, 2**40, 2**63])
        )
    elif kind == "fewer":
        del array.values[draw(st.integers(0, len(array.values))) :]
    elif kind == "more":
        array.values += draw(st.sampled_from([array.values, [""] * 300, ["x"] * 300]))
    elif kind == "element" and array.values:
        array.values[draw(st.integers(0, len(array.values) - 1))] = draw(_TEXTS if array.kind == _STRING else _ODD)
    else:
        array.kind, array.values = _ARRAY, [Array(array.kind, array.values)]


def _change_keys(draw: Any, tree: Tree) -> None:
    """A key dropped, duplicated, renamed, or added."""
    if not tree.keys:
        return
    at = draw(st.integers(0, len(tree.keys) - 1))
    kind = draw(st.sampled_from(["drop", "twice", "rename", "add", "add"]))
    if kind == "drop":
        del tree.keys[at]
    elif kind == "twice":
        tree.keys.append(copy.deepcopy(tree.keys[at]))
    elif kind == "rename":
        tree.keys[at].name = draw(st.one_of(st.sampled_from(_KNOWN), st.text(max_size=8)))
    else:
        value: Any = draw(st.one_of(_ODD, _TEXTS, st.builds(Array, _TYPES, st.lists(_ODD, max_size=4))))
        tree.keys.insert(at, Key(draw(st.sampled_from(_KNOWN)), draw(_TYPES), value))


def _change_tensor(draw: Any, tree: Tree) -> None:
    """A tensor of another shape, type, offset or name, dropped, or duplicated."""
    if not tree.tensors:
        return
    at = draw(st.integers(0, len(tree.tensors) - 1))
    tensor = tree.tensors[at]
    kind = draw(st.sampled_from(["dim", "dims", "swap", "kind", "offset", "name", "drop", "twice", "none"]))
    if kind == "dim" and tensor.dims:
        tensor.dims[draw(st.integers(0, len(tensor.dims) - 1))] = draw(_ODD)
    elif kind == "dims":
        tensor.dims += draw(st.lists(st.sampled_from([0, 1, 2, 32, 2**20, 2**62]), min_size=1, max_size=5))
    elif kind == "swap":
        tensor.dims.reverse()
    elif kind == "kind":
        tensor.kind = draw(_TENSOR_TYPES)
    elif kind == "offset":
        tensor.offset = draw(
            st.sampled_from(
                [0, 1, 16, 32, tensor.offset + 1, tensor.offset + 32, len(tree.data), 2**40, 2**63, 2**64 - 32]
            )
        )
    elif kind == "name":
        other = draw(st.sampled_from(tree.tensors)).name
        tensor.name = draw(
            st.one_of(
                st.sampled_from([other, "", "rope_freqs.weight", "x" * 70_000, "blk.9999.attn_q.weight"]),
                st.text(max_size=6),
            )
        )
    elif kind == "none":
        tensor.dims = []
    elif kind == "drop":
        del tree.tensors[at]
    else:
        tree.tensors.append(replace(tensor, dims=list(tensor.dims)))


def _change_file(draw: Any, tree: Tree) -> None:
    """Wrong counts, another alignment, byte order or version, or data that are truncated or longer."""
    kind = draw(st.sampled_from(["keys", "tensors", "alignment", "pad", "order", "version", "data", "longer"]))
    if kind == "keys":
        tree.stated_keys = draw(st.sampled_from([0, len(tree.keys) - 1, len(tree.keys) + 1, 9999, 2**40]))
    elif kind == "tensors":
        tree.stated_tensors = draw(st.sampled_from([0, len(tree.tensors) - 1, len(tree.tensors) + 1, 2**20, 2**40]))
    elif kind == "alignment":
        stated = draw(st.sampled_from([0, 1, 2, 3, 8, 16, 31, 64, 4096, 2**31, 2**32 - 1]))
        tree.keys.append(Key("general.alignment", draw(st.sampled_from([4, 4, 4, 5, 6, 8, 10])), stated))
        tree.alignment = stated if stated <= 4096 and draw(st.booleans()) else tree.alignment
    elif kind == "pad":
        tree.alignment = draw(st.sampled_from([1, 8, 64]))
    elif kind == "order":
        tree.order = ">"
    elif kind == "version":
        tree.version = draw(st.sampled_from([0, 1, 2, 4, 2**16, 2**31]))
    elif kind == "data":
        tree.data = tree.data[: draw(st.integers(0, len(tree.data)))]
    else:
        tree.data += b"\0" * draw(st.sampled_from([1, 31, 32, 4096]))
