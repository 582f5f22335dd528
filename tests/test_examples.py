"""The notebooks of examples/, in a folder of their own, with tiny models and few steps."""

import functools
import re
from pathlib import Path

import jax
import matplotlib
import pytest
from tiny_inputs import TEXTS

from tinybert_jax.data.wordpiece import train_wordpiece
from tinybert_jax.huggingface.folder import save_model, write_json
from tinybert_jax.huggingface.head import Head
from tinybert_jax.huggingface.sentence_folder import SentenceFolder, sentence_files
from tinybert_jax.models.heads import make_encoder, make_span_scorer
from tinybert_jax.settings.sizes import ModelConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
FEW = {"num_seeds": 1, "distillation.teacher_margin": -1} | {
    f"{stage}.num_epochs": 1 for stage in ("finetune", "intermediate", "prediction", "baseline")
}
TWO = {"2l-16d": (2, 16), "1l-8d": (1, 8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher of 2 layers × 16, and models for answers and for vectors."""
    place = tmp_path_factory.mktemp("examples")
    words = [*TEXTS, *(EXAMPLES / "own_csv.py").read_text().lower().split("\n")]
    tokenizer = train_wordpiece(words, vocab_size=200)
    sizes = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    key = jax.random.key(0)
    save_model(place / "teacher", make_encoder(sizes)[1](key), sizes, tokenizer)
    head = Head("QuestionAnswering", None, ("start", "end"), {})
    files = sentence_files(SentenceFolder("mean", True, 64), 16, 64)
    more = {name: functools.partial(write_json, tree=tree) for name, tree in files.items()}
    params = make_encoder(sizes)[1](key)
    save_model(place / "vectors", params, sizes, tokenizer, extra=more)
    params = make_span_scorer(sizes)[1](key)
    save_model(place / "answers", params, sizes, tokenizer, head=head)
    return place


# The notebooks are run in this order, in one folder: the later ones read what the first has made.
@pytest.mark.usefixtures("cheap_programs")
@pytest.mark.parametrize(
    "name, constants, shown",
    [
        ("own_csv", {"TEACHER": "teacher", "STUDENT": "1l-8d", "SETTINGS": FEW}, r"hf\b"),
        (
            "sizes",
            {"TEACHER": "teacher", "SIZES": TWO, "SETTINGS": FEW},
            "",
        ),
        ("inside_a_model", {}, r"student's layer 1, teacher's layer 2: correlation -?\d"),
        ("question_answering", {"MODEL": "answers"}, r"What does TinyBERT compare\?\n    \w"),
        ("faq_search", {"MODEL": "vectors"}, r"I can't log in any more\n    -?[01]\.\d\d  "),
    ],
)
@pytest.mark.filterwarnings("ignore:answers. 1 of 3 questions has more than 32 tokens")
def test_a_notebook_runs(name, constants, shown, folder, monkeypatch, capsys):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    for constant, value in constants.items():
        text, count = re.subn(rf"(?m)^{constant} = .*$", f"{constant} = {value!r}", text)
        assert count == 1, constant
    monkeypatch.chdir(folder)
    matplotlib.use("agg")
    exec(compile(text, f"{name}.py", "exec"), {"__name__": "__main__"})
    assert re.search(shown, capsys.readouterr().out)
    for picture in re.findall(r'savefig\("(.*?)"', text):
        assert Path(picture).stat().st_size > 5000
