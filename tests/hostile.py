"""Model folders of people who mean harm, made by code: each case spoils a good folder in one way.

Every payload, if it ran, would create the file `canary` beside the folder.
"""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

CANARY = "canary"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WORDS = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.1.attention.self.query.weight"
HEAD = "classifier.weight"


class Case(NamedTuple):
    name: str
    spoil: Callable[[Path], None]
    naming: tuple[str, ...]  # what the message says
    is_harmless: bool = False  # every loader but the converter reads the folder, payload unopened


CASES: list[Case] = []


def case(name: str, spoil: Callable[[Path], None], *naming: str, is_harmless: bool = False) -> None:
    CASES.append(Case(name, spoil, naming, is_harmless))


# Ways to spoil


def settings(file: str, **fields: Any) -> Callable[[Path], None]:
    """Sets keys of a JSON file."""

    def spoil(folder: Path) -> None:
        path = folder / file
        tree = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**tree, **fields}))

    return spoil


def content(file: str, data: bytes | str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    return spoil


def only(file: str, data: bytes) -> Callable[[Path], None]:
    """The folder's only weights are in another file."""

    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / file).write_bytes(data)

    return spoil


def weights(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """`change` works on the tensors, in place."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def header(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """`change` works on the header, in place, or returns the bytes of another one."""

    def spoil(folder: Path) -> None:
        file = folder / WEIGHTS
        tree, rest = split(file.read_bytes())
        text = change(tree)
        file.write_bytes(join(text if isinstance(text, bytes) else json.dumps(tree).encode(), rest))

    return spoil


def split(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(text: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + rest


def shards(change: Callable[[dict], Any], *, keep: bool = False) -> Callable[[Path], None]:
    """Two shards; `change` works on their index, in place. `keep`: the single file stays."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
        for file in sorted(set(files.values())):
            part = {name: tensors[name] for name in tensors if files[name] == file}
            save_file(part, folder / file)
        if not keep:
            (folder / WEIGHTS).unlink()
        index = {"metadata": {}, "weight_map": files}
        text = change(index)
        (folder / INDEX).write_text(text if isinstance(text, str) else json.dumps(index))

    return spoil


def link(file: str, target: Callable[[Path], str | Path]) -> Callable[[Path], None]:
    """Replaces a file by a link; a file outside the folder has the same content."""

    def spoil(folder: Path) -> None:
        path, outside = folder / file, folder.parent / f"outside-{file}"
        if path.is_file():
            outside.write_bytes(path.read_bytes())
            path.unlink()
        path.symlink_to(target(outside))

    return spoil


def both(*parts: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for part in parts:
            part(folder)

    return spoil


# Payloads


def code(folder: Path) -> str:
    """Python that creates the canary, with everything that transformers would look for in it."""
    return (
        f"open({str(folder.parent / CANARY)!r}, 'w').close()\n"
        "class Evil:\n    @classmethod\n    def from_pretrained(cls, *a, **k): return cls()\n"
    )


def module(folder: Path) -> None:
    (folder / "evil.py").write_text(code(folder))


class _Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def pickled(folder: Path, protocol: int = 2) -> bytes:
    return pickle.dumps(_Payload(folder.parent / CANARY), protocol=protocol)


def archive(folder: Path, **files: bytes) -> bytes:
    """A zip file with a pickle, as PyTorch, Keras and NumPy write."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as zipped:
        for name, data in {"archive/data.pkl": pickled(folder), **files}.items():
            zipped.writestr(name, data)
    return memory.getvalue()


def tarball(folder: Path) -> bytes:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as packed:
        entry = tarfile.TarInfo("../../canary")
        entry.size = 1
        packed.addfile(entry, io.BytesIO(b"x"))
    return memory.getvalue()


def keras(folder: Path) -> bytes:
    config = {"module": "builtins", "class_name": "exec", "config": {"source": code(folder)}}
    return archive(folder, **{"config.json": json.dumps(config).encode()})


def put(file: str, data: Callable[[Path], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content(file, data(folder))(folder)

    return spoil


def lone(file: str, data: Callable[[Path], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        only(file, data(folder))(folder)

    return spoil


# Keys that name code: CVE-2026-4372 (an implementation of attention from the hub), CVE-2026-5241
# (trust_remote_code within a section), and their relatives.

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
for _name, _fields, *_naming in [
    ("auto_map", {"auto_map": {"AutoModel": "evil.Evil"}}),
    ("auto_map of a config", {"auto_map": {"AutoConfig": "evil.Evil"}}, "auto_map"),
    ("auto_map of the hub", {"auto_map": {"AutoModel": "thief/repo--evil.Evil"}}, "thief/repo"),
    ("auto_map as a list", {"auto_map": ["evil.Evil", None]}),
    ("auto_map as text", {"auto_map": "evil.Evil"}),
    (
        "auto_map in a section",
        {"text_config": {"auto_map": {"AutoModel": "evil.Evil"}}},
        "auto_map",
    ),
    ("auto_map in a list", {"sections": [{"auto_map": {"AutoModel": "e.E"}}]}, "auto_map"),
    ("custom_pipelines", {"custom_pipelines": {"x": {"impl": "evil.Evil"}}}),
    ("trust_remote_code", {"trust_remote_code": True}),
    ("trust_remote_code as text", {"trust_remote_code": "true"}),
    ("CVE-2026-5241", {"detector_config": {"trust_remote_code": True}}, "trust_remote_code"),
    ("CVE-2026-4372", {"_attn_implementation_internal": "thief/kernel"}, "thief/kernel"),
    ("_experts_implementation_internal", {"_experts_implementation_internal": "thief/kernel"}),
    ("_other_internal", {"_other_internal": "thief/kernel"}),
    ("an _internal key in a section", {"a": {"_attn_implementation_internal": "t/k"}}, "t/k"),
    ("attn_implementation", {"attn_implementation": "thief/kernel"}, "thief/kernel"),
    ("_attn_implementation", {"_attn_implementation": {"": "thief/kernel@main"}}, "thief/kernel"),
    ("experts_implementation", {"experts_implementation": "thief/kernel:fn"}, "thief/kernel"),
    ("quantization_config", {"quantization_config": {"quant_method": "evil"}}, "evil"),
    ("quantization_config awq", {"quantization_config": {"quant_method": "awq"}}, "awq"),
    ("compression_config", {"compression_config": {"quant_method": "evil"}}),
    ("configuration_files", {"configuration_files": ["../config.5.0.json"]}, "../config.5"),
    ("fast_tokenizer_files in config.json", {"fast_tokenizer_files": ["../evil.json"]}),
]:
    case(_name, both(module, settings(CONFIG, **_fields)), CONFIG, *(_naming or _fields))

for _name, _fields, *_naming in [
    ("tokenizer auto_map", {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}, "auto_map"),
    ("tokenizer auto_map, old", {"auto_map": ["evil.Evil", "evil.Evil"]}, "auto_map"),
    ("tokenizer auto_map, hub", {"auto_map": {"AutoTokenizer": ["t/r--e.E", None]}}, "t/r--e.E"),
    ("tokenizer trust_remote_code", {"trust_remote_code": True}, "trust_remote_code"),
    ("tokenizer custom_pipelines", {"custom_pipelines": {"a": 1}}, "custom_pipelines"),
    ("fast_tokenizer_files", {"fast_tokenizer_files": ["../evil.json"]}, "../evil.json"),
    ("fast_tokenizer_files, version", {"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "4.0.json"),
    ("tokenizer_file outside", {"tokenizer_file": "/etc/passwd"}, "/etc/passwd"),
    ("vocab_file outside", {"vocab_file": "../../vocab.txt"}, "../../vocab.txt"),
    ("merges_file outside", {"merges_file": "sub/merges.txt"}, "sub/merges.txt"),
    ("vocab_file that is not there", {"vocab_file": "other.txt"}, "other.txt"),
    ("tokenizer_file with an escape", {"tokenizer_file": "\x1b[2Jx"}, "\\x1b[2Jx"),
    ("tokenizer_file as a list", {"tokenizer_file": ["tokenizer.json"]}, "tokenizer_file"),
]:
    case(_name, both(module, settings(TOKENIZER, **_fields)), TOKENIZER, *_naming)
for _name, _fields, *_naming in [
    ("model_max_length as text", {"model_max_length": "long"}, "model_max_length"),
    ("model_max_length below 1", {"model_max_length": -1}, "model_max_length"),
    ("tokenizer_class as a list", {"tokenizer_class": ["evil.Evil"]}, "tokenizer"),
    ("padding_side", {"padding_side": "up"}, "Padding side"),
    ("a Japanese tokenizer", {"tokenizer_class": "BertJapaneseTokenizer"}, "tokenizer"),
]:
    case(_name, settings(TOKENIZER, **_fields), *_naming)
case(
    "special_tokens_map auto_map",
    both(module, settings("special_tokens_map.json", auto_map={"AutoTokenizer": "evil.Evil"})),
    "special_tokens_map.json",
    "auto_map",
)
case(
    "special_tokens_map vocab_file",
    settings("special_tokens_map.json", vocab_file="/etc/passwd"),
    "/etc/passwd",
)

# config.json that fits no model

for _name, _fields, *_naming in [
    ("model_type as a list", {"model_type": ["bert"]}, "model_type"),
    ("model_type as a mapping", {"model_type": {"bert": 1}}, "model_type"),
    ("model_type with an escape", {"model_type": "\x1b]0;x\x07"}, "\\x1b]0;x\\x07"),
    ("layers: 10 ** 9", {"num_hidden_layers": 10**9}, "num_hidden_layers", "1000000000"),
    ("layers: 10 ** 30", {"num_hidden_layers": 10**30}, "num_hidden_layers"),
    ("layers: 513", {"num_hidden_layers": 513}, "num_hidden_layers", "512", "513"),
    ("layers: more than there are", {"num_hidden_layers": 7}, "encoder.layer.2"),
    ("layers: fewer than there are", {"num_hidden_layers": 1}, "encoder.layer.1"),
    ("layers: 0", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("layers: text", {"num_hidden_layers": "many"}, "num_hidden_layers", "many"),
    ("layers: true", {"num_hidden_layers": [2]}, "num_hidden_layers"),
    ("hidden_size: 2 ** 62", {"hidden_size": 2**62}, "hidden_size"),
    ("hidden_size: another", {"hidden_size": 32}, "16]", "32]"),
    ("vocab_size: 2 ** 40", {"vocab_size": 2**40}, "vocab_size"),
    ("intermediate_size: 2 ** 50", {"intermediate_size": 2**50}, "intermediate_size"),
    ("positions: 2 ** 40", {"max_position_embeddings": 2**40}, "max_position_embeddings"),
    ("positions: 0", {"max_position_embeddings": 0}, "max_position_embeddings"),
    ("heads: 0", {"num_attention_heads": 0}, "num_attention_heads"),
    ("pad_token_id beyond the table", {"pad_token_id": 10**6}, "pad_token_id", "1000000"),
    ("layer_norm_eps: NaN", {"layer_norm_eps": float("nan")}, "layer_norm_eps"),
    ("layer_norm_eps: 10 ** 400", {"layer_norm_eps": 10**400}, "layer_norm_eps"),
    ("hidden_act with an escape", {"hidden_act": "\x1b[31mred"}, "\\x1b[31mred"),
    ("is_decoder", {"is_decoder": True}, "is_decoder"),
    ("relative positions", {"position_embedding_type": "relative_key"}, "relative_key"),
    ("architectures as text", {"architectures": "BertForSequenceClassification"}, "architectures"),
    ("architectures of numbers", {"architectures": [1]}, "architectures"),
    ("architectures as a mapping", {"architectures": {"a": "b"}}, "architectures"),
    ("another architecture", {"architectures": ["BertForEvil"]}, "BertForEvil"),
    ("problem_type as a list", {"problem_type": ["regression"]}, "problem_type"),
    ("tinybert_task as a mapping", {"tinybert_task": {"a": 1}}, "tinybert_task"),
    ("tinybert_answers as a list", {"tinybert_answers": [1]}, "tinybert_answers"),
    ("tinybert_answers: infinity", {"tinybert_answers": {"threshold": float("inf")}}, "threshold"),
    ("labels with a gap", {"id2label": {"0": "neg", "2": "pos"}}, "id2label", "'2'"),
    ("labels twice", {"id2label": {"0": "neg", "1": "neg"}}, "id2label", "'neg'"),
    ("a label that is null", {"id2label": {"0": "neg", "1": None}}, "id2label", "None"),
    ("a label without a name", {"id2label": {"0": "neg", "1": ""}}, "id2label", "''"),
    ("a label that is a mapping", {"id2label": {"0": "neg", "1": {"a": 1}}}, "id2label"),
    ("labels from -1", {"id2label": {"-1": "neg", "0": "pos"}}, "id2label", "'-1'"),
    ("labels 0 and 00", {"id2label": {"0": "neg", "00": "pos"}}, "id2label", "'00'"),
    ("a label with a lone surrogate", {"id2label": {"0": "neg", "1": "\ud800"}}, "\\ud800"),
    ("a label with an escape", {"id2label": {"0": "neg", "1": "\x1b[2J"}}, "\\x1b[2J"),
    ("labels as text", {"id2label": "neg pos"}, "id2label", "neg pos"),
    ("more labels than outputs", {"id2label": {"0": "a", "1": "b", "2": "c"}}, "2", "3"),
]:
    case(_name, settings(CONFIG, **_fields), *_naming)

for _name, _data in [
    ("empty", b""),
    ("no JSON", b"{'model_type': 'bert'}"),
    ("a list", b"[1]"),
    ("a number of 5000 digits", b'{"vocab_size": ' + b"9" * 5000 + b"}"),
    ("no UTF-8", b'{"model_type": "\xff"}'),
    ("a byte order mark", b"\xef\xbb\xbf{}"),
    ("a key twice", b'{"model_type": "evil", "model_type": "bert"}'),
    ("deep lists", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("deep mappings", b'{"a": ' * 900 + b"1" + b"}" * 900),
    ("a pickle", b"\x80\x02}q\x00."),
]:
    case(f"config.json: {_name}", content(CONFIG, _data), CONFIG, "expected")
    case(f"tokenizer_config.json: {_name}", content(TOKENIZER, _data), TOKENIZER, "expected")


def sparse(file: str) -> Callable[[Path], None]:
    """100 GB of zeros that take no space."""

    def spoil(folder: Path) -> None:
        with (folder / file).open("wb") as opened:
            opened.truncate(100 << 30)

    return spoil


def instead(file: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return spoil


case("config.json: 100 GB", sparse(CONFIG), CONFIG, "bytes of JSON")
case("config.json: a folder", instead(CONFIG, Path.mkdir), CONFIG)
case("config.json: a pipe", instead(CONFIG, os.mkfifo), CONFIG, "neither a file nor")
case("weights: a pipe", instead(WEIGHTS, os.mkfifo), WEIGHTS, "neither a file nor")
case("weights: 100 GB of zeros", sparse(WEIGHTS), WEIGHTS, "complete safetensors file")
case("an adapter", content("adapter_config.json", "{}"), "adapter_config.json")

# Links

for _file in (CONFIG, WEIGHTS, "tokenizer.json", TOKENIZER, "vocab.txt"):
    case(f"a link: {_file}", link(_file, lambda outside: outside), _file, "outside of the folder")
case("a link: relative", link(CONFIG, lambda p: Path("..") / p.name), CONFIG, "outside of the")
case("a link to the machine", link("added_tokens.json", lambda _: "/etc/passwd"), "/etc/passwd")
case("a link to a device", link("vocab.txt", lambda _: "/dev/zero"), "/dev/zero")
case("a link to a folder", link("chat_templates", lambda _: "/etc"), "chat_templates", "/etc")
case("a link to nothing", link("vocab.txt", lambda _: "gone.txt"), "vocab.txt", "neither a file")
case("a link to itself", link("vocab.txt", lambda _: "vocab.txt"), "vocab.txt", "itself")

# Tokenizers


def tokens(change: Callable[[dict], Any], *more: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "tokenizer.json"
        tree = json.loads(file.read_text())
        change(tree)
        file.write_text(json.dumps(tree))
        both(*more)(folder)

    return spoil


def set_cls(tree: dict) -> None:
    tree["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [54321]


GENERIC = settings(TOKENIZER, tokenizer_class="PreTrainedTokenizerFast")
_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
case(
    "one id beyond the table, with few pieces",
    tokens(lambda tree: tree["model"]["vocab"].update(tea=4294967295)),
    "vocabulary",
    "4294967295",
)
case("an id that the template gives", tokens(set_cls, GENERIC), "vocabulary", "54321")
case(
    "an added token beyond the table",
    tokens(
        lambda tree: tree["added_tokens"].append(
            {"id": 9999, "content": "<evil>", "special": True, **_TOKEN}
        ),
        GENERIC,
    ),
    "vocabulary",
)
case(
    "a negative id",
    tokens(lambda tree: tree["model"]["vocab"].update(tea=-1)),
    "tokenizer",
)
case(
    "more pieces than rows",
    tokens(lambda tree: tree["model"]["vocab"].update({f"x{i}": 60 + i for i in range(99)})),
    "vocabulary",
)
case("tokenizer.json: no JSON", content("tokenizer.json", '{"model": '), "tokenizer")
case("tokenizer.json: a list", content("tokenizer.json", "[]"), "tokenizer")
case("tokenizer.json: deep", content("tokenizer.json", "[" * 10**5 + "]" * 10**5), "tokenizer")
case(
    "a normaliser that makes tokenizers panic",
    tokens(
        lambda tree: tree.update(
            normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
        ),
        GENERIC,
    ),
    "tokenizer",
)
case(
    "vocab.txt longer than the table",
    both(
        instead("tokenizer.json", lambda path: None),
        content("vocab.txt", "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(99))])),
    ),
    "vocabulary",
)

# Index files

PART = "part-0.safetensors"
_swapped = {PART: "part-1.safetensors", "part-1.safetensors": PART}
for _name, _change, *_naming in [
    ("no weight_map", lambda i: i.pop("weight_map"), "weight_map"),
    ("an empty weight_map", lambda i: i["weight_map"].clear(), "weight_map"),
    ("a list", lambda i: i.update(weight_map=[PART]), "weight_map"),
    ("a number", lambda i: i["weight_map"].update({WORDS: 1}), "weight_map"),
    ("null", lambda i: i["weight_map"].update({WORDS: None}), "weight_map"),
    ("a list of files", lambda i: i["weight_map"].update({WORDS: [PART]}), "weight_map"),
    ("a path upwards", lambda i: i["weight_map"].update({WORDS: f"../{PART}"}), f"../{PART}"),
    ("a whole path", lambda i: i["weight_map"].update({WORDS: f"/tmp/{PART}"}), f"/tmp/{PART}"),
    ("a sub-folder", lambda i: i["weight_map"].update({WORDS: f"a/{PART}"}), f"a/{PART}"),
    ("a backslash", lambda i: i["weight_map"].update({WORDS: f"..\\{PART}"}), PART),
    ("a pickle", lambda i: i["weight_map"].update({WORDS: "evil.bin"}), "evil.bin"),
    ("an escape", lambda i: i["weight_map"].update({WORDS: "\x1b[2J.safetensors"}), "\\x1b[2J"),
    ("a zero byte", lambda i: i["weight_map"].update({WORDS: "a\0.safetensors"}), "a\\x00"),
    ("a missing file", lambda i: i["weight_map"].update(x="gone.safetensors"), "gone.safetensors"),
    ("a surplus tensor", lambda i: i["weight_map"].pop(WORDS) and None, WORDS),
    ("a missing tensor", lambda i: i["weight_map"].update(evil=PART), "evil"),
    (
        "another file of a tensor",
        lambda i: i["weight_map"].update({WORDS: _swapped[i["weight_map"][WORDS]]}),
        WORDS,
    ),
    ("no JSON", lambda i: "{", INDEX),
    ("a tensor twice", lambda i: json.dumps(i)[:-2] + f', "{WORDS}": "{PART}"}}}}', WORDS),
]:
    case(f"index: {_name}", shards(_change), *_naming)


def other_words(folder: Path) -> None:
    shards(lambda index: None, keep=True)(folder)
    weights(lambda t: t.update({WORDS: t[WORDS] + 1}))(folder)


case("two sources that differ in a weight", other_words, INDEX, WORDS)
case(
    "two sources that differ in a name",
    both(
        shards(lambda index: None, keep=True),
        weights(lambda tensors: tensors.update(evil=np.zeros(1, np.float32))),
    ),
    INDEX,
    "evil",
)

# Headers

for _name, _length, *_naming in [
    ("0 bytes", 0, "header of 0 bytes"),
    ("more than the file", 1 << 20, "header of 1048576 bytes"),
    ("2 ** 63", 1 << 63, str(1 << 63)),
]:
    case(
        f"header: {_name}",
        lambda folder, n=_length: (folder / WEIGHTS).write_bytes(
            struct.pack("<Q", n) + (folder / WEIGHTS).read_bytes()[8:]
        ),
        WEIGHTS,
        *_naming,
    )


def entry(**fields: Any) -> Callable[[dict], None]:
    return lambda tree: tree[QUERY].update(fields)


for _name, _change, *_naming in [
    ("no JSON", lambda tree: b"{" * 50, WEIGHTS),
    ("a list", lambda tree: b"[]", "list"),
    ("deep", lambda tree: b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested"),
    ("a tensor twice", lambda tree: json.dumps(tree).encode()[:-1] + b', "a": 1, "a": 2}', "'a'"),
    ("no tensors", lambda tree: tree.clear(), "bytes of weights"),
    ("a number as a tensor", lambda tree: tree.update({QUERY: 1}), QUERY),
    ("a name with an escape", lambda tree: tree.update({"\x1b[2J": tree.pop(QUERY)}), "\\x1b[2J"),
    ("a name with a surrogate", lambda tree: tree.update({"\ud800": tree.pop(QUERY)}), "\\ud800"),
    ("an empty name", lambda tree: tree.update({"": tree.pop(QUERY)}), "''"),
    ("no shape", lambda tree: tree[QUERY].pop("shape"), QUERY),
    ("one more key", entry(evil=1), QUERY, "evil"),
    ("F8_E4M3", entry(dtype="F8_E4M3"), "F8_E4M3"),
    ("F8_E5M2", entry(dtype="F8_E5M2"), "F8_E5M2"),
    ("F4", entry(dtype="F4"), "F4"),
    ("C64", entry(dtype="C64"), "C64"),
    ("an unknown format", entry(dtype="EVIL"), "EVIL"),
    ("a format with an escape", entry(dtype="\x1b[2J"), "\\x1b[2J"),
    ("a number as the format", entry(dtype=1), QUERY),
    ("a wider format", entry(dtype="F64"), QUERY),
    ("integers", entry(dtype="I32"), QUERY, "int32"),
    ("a negative size", entry(shape=[-16, -16]), "-16"),
    ("a fraction as a size", entry(shape=[16.0, 16]), "16.0"),
    ("true as a size", entry(shape=[True, 256]), "True"),
    ("text as a shape", entry(shape="16"), QUERY),
    ("sizes whose product overflows", entry(shape=[1 << 32, 1 << 32]), QUERY),
    ("sizes of 10 ** 30", entry(shape=[10**30, 0]), QUERY),
    ("another shape", entry(shape=[8, 32]), QUERY, "[16, 16]", "[8, 32]"),
    ("nine axes", entry(shape=[16, 16, *[1] * 7]), QUERY),
    ("a place before the file", entry(data_offsets=[-1024, 0]), QUERY),
    ("a place that ends first", entry(data_offsets=[1024, 0]), QUERY),
    ("one number as a place", entry(data_offsets=[0]), QUERY),
    ("the place of another", entry(data_offsets=[0, 1024]), "byte"),
    ("a place beyond the file", entry(data_offsets=[1 << 40, (1 << 40) + 1024]), "byte"),
    ("metadata that are no text", lambda tree: tree.update(__metadata__={"a": 1}), WEIGHTS),
]:
    case(f"header: {_name}", header(_change), *_naming)


def longer(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"evil" * 10)


case("bytes after the weights", longer, WEIGHTS, "bytes of weights")

# Weights


def value(name: str, number: float, dtype: Any = np.float32) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: np.full(tensors[name].shape, number, dtype)})


def head(*shape: int) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.update({HEAD: np.zeros(shape, np.float32)}))


for _name, _change, *_naming in [
    ("NaN", value(QUERY, np.nan), QUERY, "NaN"),
    ("infinity", value(QUERY, np.inf), QUERY, "infinity"),
    ("minus infinity", value(QUERY, -np.inf), QUERY, "infinity"),
    ("1e30", value(QUERY, 1e30), QUERY, "1e+30"),
    ("-1e38", value(WORDS, -1e38), WORDS, "1e+38"),
    ("1e300, beyond fp32", value(QUERY, 1e300, np.float64), QUERY, "beyond fp32"),
    ("infinity in fp16", value(QUERY, np.inf, np.float16), QUERY, "infinity"),
    ("integers", value(QUERY, 1, np.int8), QUERY, "int8"),
    ("booleans", value(QUERY, 1, np.bool_), QUERY, "bool"),
    ("one layer more", lambda t: t.update({QUERY.replace("1", "2"): t[QUERY]}), "encoder.layer.2"),
    ("one tensor less", lambda t: t.pop(QUERY), QUERY),
    ("no words", lambda t: t.pop(WORDS), "embeddings"),
    ("fewer words", lambda t: t.update({WORDS: t[WORDS][:9].copy()}), WORDS, "[9, 16]"),
    ("a weight under two names", lambda t: t.update({QUERY[5:]: t[QUERY]}), QUERY[5:]),
    ("no tensor", lambda t: t.clear(), "expected"),
]:
    case(f"weights: {_name}", weights(_change), *_naming)
case("a head of 0 rows", both(head(0, 16), settings(CONFIG, id2label={})), HEAD, "[0, 16]")
case("a head without axes", head(), HEAD, "[]")
case("a head of one axis", head(2), HEAD, "[2]")
case("a head of three axes", head(2, 16, 1), HEAD, "[2, 16, 1]")
case("a head of other rows", head(5, 16), "5", "2")
case("a head of other width", head(2, 99), HEAD, "[2, 99]")

# Other formats than safetensors: CVE-2025-32434 (torch.load with weights_only=True), CVE-2025-1550
# (Keras), CVE-2026-1839 (rng_state.pth). They are never opened, also where they are the only ones.

for _name, _file, _data in [
    ("CVE-2025-32434", "pytorch_model.bin", archive),
    ("a pickle of protocol 0", "pytorch_model.bin", lambda folder: pickled(folder, 0)),
    ("CVE-2025-1550", "model.keras", keras),
    ("HDF5", "tf_model.h5", lambda folder: b"\x89HDF\r\n\x1a\n" + pickled(folder)),
    ("a checkpoint", "model.ckpt", pickled),
]:
    case(f"only {_name}", lone(_file, _data), WEIGHTS)
for _name, _data, _word in [
    ("a pickle", lambda folder: pickled(folder, 4), "a pickle"),
    ("an archive", archive, "an archive"),
    ("HDF5", lambda folder: b"\x89HDF\r\n\x1a\n", "Keras"),
    ("GGUF", lambda folder: b"GGUF\3\0\0\0", "GGUF"),
    ("Git LFS", lambda folder: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
]:
    case(f"{_name}, named model.safetensors", put(WEIGHTS, _data), WEIGHTS, _word)

for _file, _data in [
    ("evil.py", lambda folder: code(folder).encode()),
    ("modeling_bert.py", lambda folder: code(folder).encode()),
    ("pytorch_model.bin", archive),  # CVE-2025-32434
    ("training_args.bin", pickled),
    ("rng_state.pth", archive),  # CVE-2026-1839
    ("optimizer.pt", archive),
    ("scheduler.pt", pickled),
    ("weights.pkl", pickled),
    ("weights.joblib", pickled),
    ("model.ckpt", pickled),
    ("model.keras", keras),  # CVE-2025-1550
    ("tf_model.h5", lambda folder: b"\x89HDF\r\n\x1a\n"),
    ("saved_model.pb", pickled),
    ("weights.npz", archive),
    ("model.zip", archive),
    ("model.tar.gz", tarball),
    ("evil.so", lambda folder: b"\x7fELF"),
    ("sub/evil.py", lambda folder: code(folder).encode()),
    ("notes.dat", lambda folder: pickled(folder, 4)),  # by its first bytes
    ("README.md", archive),
    ("merges.txt", lambda folder: b"\x7fELF\x02"),
    ("model.gguf", lambda folder: b"GGUF"),
]:
    case(f"beside the model: {_file}", put(_file, _data), _file, is_harmless=True)
case(
    "beside the model: a link in a sub-folder",
    both(content("sub/a.txt", "a"), link("sub/b.txt", lambda _: "/etc/passwd")),
    "/etc/passwd",
    is_harmless=True,
)
