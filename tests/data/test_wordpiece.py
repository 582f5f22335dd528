"""`tinybert data vocab`: a WordPiece vocabulary from text files."""

import pytest
import tokenizers
import transformers

from tinybert_jax import cli
from tinybert_jax.data.wordpiece import decode_texts, train_wordpiece
from tinybert_jax.huggingface.hub import load_tokenizer


def test_vocabularies_cased_uncased_and_chinese(tmp_path, capsys):
    text = "Der Ärger wächst. " * 9 + "我们在家里看电影。" * 9
    (tmp_path / "text.txt").write_text(text)
    command = ["data", "vocab", str(tmp_path / "text.txt"), "--size", "90", "-o"]
    assert cli.main([*command, str(tmp_path / "lower")]) == 0
    assert "pieces from" in capsys.readouterr().out
    assert cli.main([*command, str(tmp_path / "cased"), "--cased"]) == 0
    lower, cased = (
        load_tokenizer(tmp_path / name).tokenize("Ärger 电影") for name in ("lower", "cased")
    )
    assert lower[-2:] == cased[-2:] == ["电", "影"]
    assert "".join(lower[:-2]).replace("##", "") == "arger"
    assert "".join(cased[:-2]).replace("##", "") == "Ärger"
    assert cli.main([*command, str(tmp_path / "cased")]) == 2
    assert "expected a new folder; got one that exists" in capsys.readouterr().err


def test_sources_without_text_are_refused_with_the_first_bad_record(tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text('{"body": "a"}\n[1]\n')
    command = ["data", "vocab", str(tmp_path / "text.jsonl"), "-o", str(tmp_path / "out")]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "expected text; got none in 2 records (" in said and "line 1: no key 'text'" in said
    assert not (tmp_path / "out").exists()


def test_every_chinese_character_has_one_piece_and_no_continuing_piece(tmp_path):
    """The limit on letters does not apply: the text has 3,000 characters, twice each."""
    text = "".join(chr(0x4E00 + i) for i in range(3000))
    (tmp_path / "text.txt").write_text(f"{text} a\n{text} a\n")
    command = ["data", "vocab", str(tmp_path / "text.txt"), "--size", "3500", "-o"]
    assert cli.main([*command, str(tmp_path / "out")]) == 0
    pieces = load_tokenizer(tmp_path / "out").get_vocab()
    assert set(text) <= pieces.keys()
    assert len(pieces) == 5 + 3000 + 2  # a, ##a


def test_a_vocabulary_has_at_most_the_requested_size(tmp_path, capsys):
    """The most frequent letters get pieces first."""
    (tmp_path / "text.txt").write_text("we saw a tree, we saw the sea, we see 电影 电影\n" * 9)
    command = ["data", "vocab", str(tmp_path / "text.txt"), "-o", str(tmp_path / "out"), "--size"]
    assert cli.main([*command, "11"]) == 0
    pieces = load_tokenizer(tmp_path / "out").get_vocab()
    assert len(pieces) == 11 and {"e", "##e"} <= pieces.keys()
    capsys.readouterr()
    assert cli.main([*command[:-2], str(tmp_path / "no"), "--max-length", "1"]) == 2
    assert "--max-length: expected 3 or more; got 1" in capsys.readouterr().err


TEXTS = (
    'A man, who (I think) reads "War and Peace", isn\'t asleep; he has 2.5 of 10,000 pages left!',
    "Ein T-Shirt mit der Aufschrift „Hallo Welt“ hängt um 12:30 im Flur.",
    "L'été, il y a une piste cyclable/piétonne [fermée].",
    "两名男子身穿“NBA”球衣，站在（红色的）汽车旁……然后离开。",
)


def test_texts_come_back_as_they_were_written():
    tokenizer = train_wordpiece(TEXTS * 2, vocab_size=400, lowercase=False)
    ids = tokenizer(list(TEXTS))["input_ids"]
    plain = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert not set(plain) & set(TEXTS)  # without the rules none of them does
    assert decode_texts(tokenizer, ids) == list(TEXTS)


@pytest.mark.parametrize(
    "text",
    [
        "In 2019, 200 people were born.",
        "It was in 1990. 25 years later it was not.",
        "rooms 101, 104 and 2019: a year",
        "The city called 故宫 in Chinese",
        "한국 漢字 교육",
        '24" monitor',
        "he said 'stop' loudly, and the kid's father didn't",
        "Vor- und Nachteile, two- and three-year",
    ],
)
def test_what_signs_stand_apart_stay_apart(text):
    tokenizer = train_wordpiece([text] * 2, vocab_size=300, lowercase=False)
    (found,) = decode_texts(tokenizer, tokenizer([text])["input_ids"])
    assert found == text.replace('24"', '24 "')


def test_a_tokenizer_that_knows_its_spaces_is_left_alone():
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(["a ( red ) T - shirt"] * 3, vocab_size=300)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer)
    assert decode_texts(tokenizer, [tokenizer("a ( red ) T - shirt")["input_ids"]]) == [
        "a ( red ) T - shirt"
    ]
