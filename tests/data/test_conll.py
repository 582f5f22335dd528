"""conll: both formats give the same sentences; every mistake is one error that can be acted on."""

import json
import os
from pathlib import Path

import pytest

from tinybert_jax.data.conll import TaggedText, read_tagged
from tinybert_jax.metrics.tagging import detect_scheme, entities_of, scheme_mistakes

DATA = os.environ.get("TINYBERT_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="TINYBERT_DATA is unset")

WORDS = [["Ada", "Lovelace", "saw\u2028it"], ["#", "Rome\x85"]]
TAGS = [["B-PER", "I-PER", "O"], ["O", "B-LOC"]]


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def _conll(words=WORDS, tags=TAGS, separator="\t", between="\n"):
    sentences = [
        "".join(f"{word}{separator}{tag}\n" for word, tag in zip(*pair, strict=True))
        for pair in zip(words, tags, strict=True)
    ]
    return between.join(sentences)


def _jsonl(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _rows(words=WORDS, tags=TAGS):
    return [{"tokens": w, "tags": t} for w, t in zip(words, tags, strict=True)]


def _fails(path: str, *parts: str, **kwargs):
    """Reads and checks that the one error holds all parts and the three words of every error."""
    with pytest.raises(ValueError) as caught:
        read_tagged(path, **kwargs)
    for part in (": expected ", "; got ", "; fix: ", *parts):
        assert part in str(caught.value)


# Formats


def test_tabs_spaces_and_jsonl_give_the_same_sentences(write):
    for separator in ("\t", " ", "   "):
        path = write("a.conll", _conll(separator=separator))
        assert read_tagged(path) == TaggedText(WORDS, TAGS, [1, 5])
    assert read_tagged(write("a.jsonl", _jsonl(*_rows()))) == TaggedText(WORDS, TAGS, [1, 2])
    for name, format in (("a.data", "conll"), ("a.TXT", "auto"), ("tsv", "conll")):
        assert read_tagged(write(name, _conll()), format=format).words == WORDS
    assert read_tagged(Path(write("b.txt", _jsonl(*_rows()))), format="jsonl").tags == TAGS


def test_byte_order_marks_carriage_returns_and_blank_lines_are_tolerated(write):
    expected = TaggedText(WORDS, TAGS, [1, 5])
    text = _conll()
    assert read_tagged(write("a.conll", "\ufeff" + text)) == expected
    assert read_tagged(write("a.conll", text.replace("\n", "\r\n"))) == expected
    assert read_tagged(write("a.conll", text.rstrip("\n"))) == expected
    assert read_tagged(write("a.conll", text + "\n\n")) == expected
    assert read_tagged(write("a.conll", _conll(between="\t\n \n\n"))).places == [1, 7]
    jsonl = "\ufeff" + _jsonl(*_rows()).replace("\n", "\r\n")
    assert read_tagged(write("a.jsonl", jsonl)) == TaggedText(WORDS, TAGS, [1, 2])


def test_documents_part_sentences_and_comments_do_not(write):
    start, comment = "-DOCSTART-\t-X-\tO\n", "# text = Ada Lovelace saw it\n"
    tabs = start + "\n" + comment + "Ada\tB-PER\n" + comment + "Lovelace\tI-PER\n" + start
    got = read_tagged(write("a.conll", tabs + "Rome\tB-LOC\n"))
    assert got.words == [["Ada", "Lovelace"], ["Rome"]] and got.places == [4, 8]
    # With spaces "# O" is a word and its tag, and so is "-DOCSTART-x".
    spaces = "-DOCSTART- O\n\n# O\n-DOCSTART-x O\n"
    got = read_tagged(write("a.conll", spaces))
    assert got == TaggedText([["#", "-DOCSTART-x"]], [["O", "O"]], [3])


def test_columns_are_the_first_and_the_last_unless_named(write):
    path = write("a.conll", "0\tAda\tNN\tB-PER\tO\n1\tsaw\tVB\tO\tB-V\n")
    assert read_tagged(path) == ([["0", "1"]], [["O", "B-V"]], [1])
    for tags in ("3", "-2"):
        assert read_tagged(path, tokens="1", tags=tags) == ([["Ada", "saw"]], [["B-PER", "O"]], [1])
    path = write("a.jsonl", _jsonl({"words": ["Ada"], "ner": ["S-PER"], "tokens": 3}))
    assert read_tagged(path, tokens="words", tags="ner") == ([["Ada"]], [["S-PER"]], [1])


def test_unlabelled_text_needs_no_tags(write):
    one_column = write("a.conll", "Ada\n#tag\n\nRome\n")
    assert read_tagged(one_column, tags=None) == ([["Ada", "#tag"], ["Rome"]], None, [1, 4])
    assert read_tagged(write("b.conll", _conll()), tags=None) == (WORDS, None, [1, 5])
    path = write("a.jsonl", _jsonl({"tokens": ["Ada"]}))
    got = read_tagged(path, tags=None, scheme="iob2", known_tags=["O"], drop_empty_tokens=True)
    assert got == ([["Ada"]], None, [1])


def test_max_rows_keeps_the_first_sentences_and_checks_all(write):
    path = write("a.conll", _conll())
    assert read_tagged(path, max_rows=1) == (WORDS[:1], TAGS[:1], [1])
    assert read_tagged(path, max_rows=1, tags=None) == (WORDS[:1], None, [1])
    _fails(write("b.conll", _conll() + "x\tX\n"), "line 7: 'X'", max_rows=1)


def test_empty_tokens_outside_of_entities_can_be_dropped(write):
    text = "Ada\tB-PER\n \tO\n\u2009\tO\nsaw \tO\n"
    path = write("a.conll", text)
    _fails(path, "a token that is not empty", "2 of 4 lines (line 2: ' ', line 3:", "drop_empty")
    got = read_tagged(path, drop_empty_tokens=True)
    assert got == ([["Ada", "saw "]], [["B-PER", "O"]], [1])
    assert read_tagged(path, drop_empty_tokens=True, tags=None).words == [["Ada", "saw "]]
    inside = write("b.conll", text + " \tI-PER\n")
    _fails(inside, "1 of 3 lines (line 5: ' ')", drop_empty_tokens=True)
    alone = write("c.jsonl", _jsonl({"tokens": [" "], "tags": ["O"]}))
    _fails(alone, "at least one token", "(line 1: none)", drop_empty_tokens=True)


# Mistakes


def test_arguments_that_are_wrong(write, tmp_path):
    path = write("train.conll", _conll())
    _fails(str(tmp_path / "trian.conll"), "a file", "nothing", "did you mean 'train.conll'?")
    _fails(str(tmp_path), "a file", "a folder", "one of the files")
    _fails(write("a.csv", _conll()), "a suffix of .jsonl, .conll", "'.csv'", "give format")
    _fails(write("a", _conll()), "no suffix")
    _fails(path, "format auto, conll, jsonl", "'json'", "did you mean 'jsonl'?", format="json")
    _fails(path, "1 or more", "0", "leave it out", max_rows=0)
    for wrong in ("O", []):
        _fails(path, "a list of tags", repr(wrong), "as in", known_tags=wrong)


def test_columns_that_are_not_there(write):
    path = write("a.conll", _conll())
    _fails(path, "a position", "'tokens'", "no header", tokens="tokens")
    _fails(path, "a column from -2 to 1", "'2'", "from 0", tags="2")
    _fails(path, "a column from -2 to 1", "'-3'", "from 0", tags="-3")
    _fails(path, "another of tags", "column 1 of 2 for both", "tags=None", tokens="1")
    _fails(write("b.conll", "Ada\nRome\n"), "another of tags", "column 0 of 1", "tags=None")


def test_rows_of_another_width_name_the_first_five_and_all(write):
    path = write("a.conll", _conll() * 3 + "stray\ttab\tO\n" * 6)
    places = ", ".join(f"line {n}: 3" for n in range(19, 24))
    _fails(path, "2 columns in every row", f"6 of 21 lines ({places}, …)", "stray")
    path = write("b.conll", "# a comment\nAda O\n O\nRome O\n")
    _fails(path, "2 of 4 lines (line 1: 3, line 3: 1)", '"# " starts a comment only in files with')


def test_tabs_and_spaces_in_one_file(write):
    path = write("a.conll", _conll() + "Ada B-PER\n#tag\n")
    _fails(path, "separated by tabs", "2 of 7 lines (line 7: 'Ada B-PER', line 8: '#tag')")
    path = write("a.conll", _conll(separator=" ") + "Ada\tB-PER\n")
    _fails(path, "separated by spaces", "1 of 6 lines (line 7: 'Ada\\tB-PER')", "one separator")


def test_tags_with_an_unknown_prefix_or_no_kind(write):
    wrong = ["X-PER", "B-", "I", "PER", "o", "", "b-PER"]
    path = write("a.conll", _conll() + "".join(f"Ada\t{tag}\n" for tag in wrong))
    places = "line 7: 'X-PER', line 8: 'B-', line 9: 'I', line 10: 'PER', line 11: 'o', …"
    _fails(path, "B-, I-, E- or S- and a kind", f"7 of 12 lines ({places})", "name the column")
    path = write("a.jsonl", _jsonl(*_rows(), {"tokens": ["a", "b"], "tags": ["X", "Y"]}))
    _fails(path, "1 of 3 lines (line 3: 'X')", "the column or key")


def test_tags_that_are_not_known(write):
    path = write("a.conll", _conll())
    known = ["O", "B-PER", "I-PER"]
    fix = "complete the list of tags"
    _fails(
        path,
        "one of the tags 'O', 'B-PER', 'I-PER'; got",
        "(line 6: 'B-LOC')",
        fix,
        known_tags=known,
    )
    assert read_tagged(path, known_tags=[*known, "B-LOC"]).tags == TAGS
    many = [*known, *(f"B-{n}" for n in range(30))]
    _fails(path, "'B-16', …; got", known_tags=many)


def test_sentences_that_their_scheme_does_not_allow(write):
    path = write("a.conll", "a\tO\nb\tI-LOC\nc\tI-LOC\n\n" + _conll() + "\nd\tI-PER\n")
    expected = "iob2 tags (B-kind on the first word"
    places = "2 of 9 lines (line 2: 'I-LOC' after 'O', line 12: 'I-PER' at the start)"
    _fails(path, expected, places, "name the scheme", scheme="iob2")
    assert len(read_tagged(path).tags) == 4  # no scheme: as conlleval reads it
    _fails(path, "iob1 tags", "(line 5: 'B-PER' at the start, line 10:", scheme="iob1")
    path = write("a.jsonl", _jsonl(*_rows()))
    _fails(
        path,
        "bioes tags",
        "2 of 2 lines (line 1: 'O' after 'I-PER', line 2: 'B-LOC' at the end)",
        scheme="bioes",
    )
    assert read_tagged(path, scheme="iob2").tags == TAGS


def test_files_without_sentences(write):
    _fails(write("a.conll", ""), "an empty file")
    _fails(write("b.conll", "\ufeff \n\t\n"), "nothing but white space")
    _fails(write("c.conll", "-DOCSTART- O\n\n"), "sentences", "-DOCSTART- lines alone", "check how")
    _fails(write("d.jsonl", "\n"), "nothing but white space")


def test_bytes_that_are_not_utf8(write):
    path = write("a.conll", _conll().encode() + "caf\u00e9\tO\n".encode("latin-1"))
    _fails(path, "UTF-8", "line 7: 0xe9 at byte", "iconv")
    _fails(write("a.jsonl", b'{"tokens": ["caf\xe9"], "tags": ["O"]}\n'), "UTF-8", "iconv")


def test_jsonl_rows_that_are_wrong(write):
    good = _rows()[0]

    def path(*rows):
        return write("a.jsonl", _jsonl(good, *rows))

    _fails(write("b.jsonl", _jsonl(good) + "{\n[1]\n"), "one JSON object", "line 2:", "line 3: [1]")
    _fails(path({"tokens": ["a"]}), "a key 'tags'", "1 of 2 lines (line 2: ['tokens'])")
    _fails(path(), "a column 'tokenz'", "'tokens', 'tags'", "did you mean", tokens="tokenz")
    text = {"tokens": "a b", "tags": ["O", "O"]}
    fix = '["In", "Rome"] and ["O", "B-LOC"], not as ids'
    _fails(path(text), "a list of strings under the key 'tokens'", "(line 2: 'a b')", fix)
    ids = {"tokens": ["a"], "tags": [0]}
    _fails(path(ids, ids), "strings under the key 'tags'", "2 of 3 lines (line 2: [0], ", fix)
    short, long = {"tokens": ["a"], "tags": []}, {"tokens": ["a"], "tags": ["O"] * 2}
    _fails(
        path(short, long), "one tag for each token", "2 of 3 lines (line 2: 0 for 1, line 3: 2 f"
    )
    empty = {"tokens": [], "tags": []}
    _fails(path(empty), "at least one token in", "1 of 2 lines (line 2: none)", "remove these")
    blank = {"tokens": ["", "a", " "], "tags": ["O"] * 3}
    _fails(path(blank), "a token that is not empty", "1 of 2 lines (line 2: '')", "drop_empty")


# Real data

TWEETS = {"LOC", "ORG", "PER"}
DISEASES = {"Chemical", "Disease"}
EMERGING = {"corporation", "creative-work", "group", "location", "person", "product"}


@needs_data
@pytest.mark.parametrize(
    ("path", "scheme", "num_sentences", "num_words", "num_entities", "kinds"),
    [
        ("wikigold.conll", "iob1", 1_696, 39_007, 3_558, {"LOC", "MISC", "ORG", "PER"}),
        ("wnut17/train.conll", "iob2", 3_394, 62_730, 1_975, EMERGING),
        ("wnut17/dev.conll", "iob2", 1_009, 15_733, 836, EMERGING),
        ("btc/a.conll", "iob2", 1_000, 16_612, 521, TWEETS),
        ("btc/b.conll", "iob2", 2_000, 30_825, 1_610, TWEETS),
        ("btc/e.conll", "iob2", 200, 3_981, 325, TWEETS),
        ("btc/f.conll", "iob2", 2_000, 35_425, 4_376, TWEETS),
        ("btc/g.conll", "iob2", 2_138, 34_062, 4_685, TWEETS),
        ("bc5cdr/train.tsv", "iob2", 4_560, 118_170, 9_385, DISEASES),
        ("bc5cdr/devel.tsv", "iob2", 4_581, 117_453, 9_593, DISEASES),
    ],
)
def test_real_files(path, scheme, num_sentences, num_words, num_entities, kinds):
    # Section F holds two empty tokens, both O.
    got = read_tagged(Path(DATA, "ner", path), drop_empty_tokens=path == "btc/f.conll")
    entities = [entity for tags in got.tags for entity in entities_of(tags)]
    assert (len(got.words), sum(map(len, got.words))) == (num_sentences, num_words)
    assert (len(entities), {entity.kind for entity in entities}) == (num_entities, kinds)
    assert detect_scheme(got.tags) == scheme
    assert not any(scheme_mistakes(tags, scheme) for tags in got.tags)


@needs_data
def test_every_file_of_crossner():
    sizes = {
        path.name: len(read_tagged(path, scheme="iob2").words)
        for path in Path(DATA, "ner/crossner").iterdir()
    }
    assert len(sizes) == 10
    assert sum(n for name, n in sizes.items() if "train" in name) == 700
    assert sum(n for name, n in sizes.items() if "dev" in name) == 2_121


@needs_data
def test_the_only_bad_real_file_is_refused():
    _fails(str(Path(DATA, "ner/btc/f.conll")), "2 of 35427 lines (line 16301: ' ', line 16302: '')")
