"""`tinybert data vocab`: a WordPiece vocabulary from text files."""

from tinybert_jax import cli
from tinybert_jax.convert import hf_folder


def test_vocabularies_cased_uncased_and_chinese(tmp_path, capsys):
    text = "Der Ärger wächst. " * 9 + "我们在家里看电影。" * 9
    (tmp_path / "text.txt").write_text(text)
    command = ["data", "vocab", str(tmp_path / "text.txt"), "--size", "90", "-o"]
    assert cli.main([*command, str(tmp_path / "lower")]) == 0
    assert "pieces from" in capsys.readouterr().out
    assert cli.main([*command, str(tmp_path / "cased"), "--cased"]) == 0
    lower, cased = (
        hf_folder.load_tokenizer(tmp_path / name).tokenize("Ärger 电影")
        for name in ("lower", "cased")
    )
    assert lower[-2:] == cased[-2:] == ["电", "影"]
    assert "".join(lower[:-2]).replace("##", "") == "arger"
    assert "".join(cased[:-2]).replace("##", "") == "Ärger"
    assert cli.main([*command, str(tmp_path / "cased")]) == 2
    assert "expected a new folder; got one that exists" in capsys.readouterr().err


def test_no_text_says_what_was_found(tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text('{"body": "a"}\n[1]\n')
    command = ["data", "vocab", str(tmp_path / "text.jsonl"), "-o", str(tmp_path / "out")]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "expected text; got none in 2 records (" in said and "line 1: no key 'text'" in said
    assert not (tmp_path / "out").exists()
