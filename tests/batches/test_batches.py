import jax
import numpy as np
import pytest

from tinybert_jax.batches import loader, tokenize
from tinybert_jax.batches.batch import Plan, make_batch
from tinybert_jax.batches.bucketing import bucketed_epochs, num_batches, plan_epoch
from tinybert_jax.batches.tokenize import MIN_TOKENS, tokenize_corpus, tokenize_texts
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.wordpiece import is_continuation, plain_backend, train_wordpiece

SENTENCES = [
    "a cat sat on the mat .",
    "dogs bark .",
    "the quick brown fox jumps over the lazy dog and runs away into the deep dark wood .",
] * 7


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(SENTENCES, vocab_size=120)


@pytest.fixture(scope="module")
def rows(tokenizer):
    labels = np.arange(len(SENTENCES), dtype=np.int32)
    return tokenize_texts(tokenizer, Examples(SENTENCES, None, labels, tuple(map(str, labels))), 32)


def test_rows_equal_the_encoding_of_the_tokenizer(tokenizer, rows):
    for i, text in enumerate(SENTENCES):
        expected = tokenizer(text)["input_ids"]
        assert rows.ids[rows.offsets[i] : rows.offsets[i + 1]].tolist() == expected


def test_pairs_have_token_types_and_truncate_the_longer_part(tokenizer):
    text = Examples([SENTENCES[2]], [SENTENCES[1]], np.zeros(1, np.int32), ("x",))
    rows = tokenize_texts(tokenizer, text, 12)
    expected = tokenizer(SENTENCES[2], SENTENCES[1], truncation="longest_first", max_length=12)
    plan = Plan(np.array([0]), 16)
    batch = make_batch(rows, plan, tokenizer.pad_token_id)
    assert rows.num_truncated == 1
    ids, types = batch.inputs
    assert ids[0, :12].tolist() == expected["input_ids"]
    assert types[0, :12].tolist() == expected["token_type_ids"]
    assert not types[0, 12:].any() and not batch.attention_mask[0, 12:].any()


def test_the_beginning_of_a_very_long_text_gives_the_same_rows(tokenizer, monkeypatch):
    """Texts are cut before they are tokenised, where their rows are full by then."""
    texts = [
        " ".join(SENTENCES),
        "cat" * 90 + " dog " + SENTENCES[2],  # a first word that is longer than the beginning
        " \n\t" * 40 + SENTENCES[2] * 3,
        "中文。" * 60,
        "e\u0301 " * 80 + "\x00" * 80,
        "short .",
    ]
    pairs = [None, ["dogs bark ."] * len(texts), texts[::-1]]
    for pair in pairs:
        examples = Examples(texts, pair, None, None)
        expected = tokenize_texts(tokenizer, examples, 16)
        monkeypatch.setattr(tokenize, "_LONG", 64)
        rows = tokenize_texts(tokenizer, examples, 16)
        monkeypatch.undo()
        for field in ("ids", "offsets", "second", "num_truncated"):
            assert np.array_equal(getattr(rows, field), getattr(expected, field))


def test_a_text_of_20_mb_is_cut_to_a_beginning_that_fills_a_row(tokenizer):
    backend = plain_backend(tokenizer)
    backend.enable_truncation(16)
    text = "a cat sat . " * 2_000_000
    head = tokenize._head(backend, text)
    assert tokenize._LONG / 2 < len(head) <= tokenize._LONG
    assert text.startswith(head) and text[len(head)] == " "


def test_truncation_does_not_leak_into_the_tokenizer(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    text = Examples([SENTENCES[2]], None, np.zeros(1, np.int32), ("x",))
    tokenize_texts(tokenizer, text, 8)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_corpus_rows_hold_every_token_in_order(tokenizer):
    documents = [" ".join(SENTENCES), SENTENCES[2]]
    rows = tokenize_corpus(tokenizer, documents, 16)
    assert rows.lengths.max() == 16
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    kept = [i for i in rows.ids.tolist() if i not in special]
    expected = [i for d in documents for i in tokenizer(d, add_special_tokens=False)["input_ids"]]
    # Only a document's last piece of fewer than MIN_TOKENS may be missing.
    assert len(expected) - len(kept) < len(documents) * MIN_TOKENS
    assert kept[: 14 * 8] == expected[: 14 * 8]


@pytest.mark.parametrize("seed", [None, 0, 5])
@pytest.mark.parametrize("size", [1, 4, 8, 64])
def test_an_epoch_holds_every_row_once_in_the_narrowest_bucket(seed, size):
    lengths = np.random.default_rng(1).integers(3, 33, 101)
    plans = plan_epoch(lengths, buckets=(8, 16, 32), global_batch_size=size, seed=seed, epoch=2)
    chosen = np.concatenate([plan.rows for plan in plans])
    assert sorted(chosen[chosen >= 0].tolist()) == list(range(101))
    assert len(plans) == num_batches(101, size)
    assert all(lengths[plan.rows[plan.rows >= 0]].max() <= plan.width for plan in plans)
    slots = sum(len(plan.rows) * plan.width for plan in plans)
    assert slots <= len(plans) * size * 32


def test_order_is_a_function_of_seed_and_step(rows):
    def first(start, seed, count):
        epochs = bucketed_epochs(rows.lengths, buckets=(8, 32), global_batch_size=4, seed=(seed,))
        batch_at = loader.planned_batches(rows, epochs, pad_token_id=0)
        batches = loader.prefetched(batch_at, start_step=start)
        return [next(batches) for _ in range(count)]

    straight = first(0, 7, 20)  # 6 steps an epoch: crosses three
    resumed = first(8, 7, 12)
    for a, b in zip(straight[8:], resumed, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)

    def labels(batches):
        return [tuple(batch.targets["labels"]) for batch in batches]

    assert labels(straight[:6]) != labels(straight[6:12])
    assert labels(straight[:6]) != labels(first(0, 8, 6))


def test_filler_rows_have_no_weight_and_no_mask(rows):
    plan = Plan(np.array([2, -1]), 32)
    batch = make_batch(rows, plan, 0)
    assert batch.weights.tolist() == [1.0, 0.0]
    assert batch.attention_mask[0].any() and not batch.attention_mask[1].any()


def test_wordpiece_training_is_deterministic(tokenizer):
    again = train_wordpiece(SENTENCES, vocab_size=120)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert tokenizer.tokenize("Café MAT") == again.tokenize("cafe mat")


def test_is_continuation_agrees_with_the_word_ids_of_the_tokenizer(tokenizer):
    table = is_continuation(tokenizer)
    encoded = tokenizer("foxes jumping over zebras .", add_special_tokens=False)
    words = encoded.word_ids()
    expected = [i > 0 and words[i] == words[i - 1] for i in range(len(words))]
    assert table[encoded["input_ids"]].tolist() == expected
    assert any(expected) and not table[tokenizer.all_special_ids].any()


def test_any_change_changes_the_fingerprint(rows):
    same = rows._replace(ids=rows.ids.copy())
    assert same.fingerprint() == rows.fingerprint()
    ids, labels = rows.ids.copy(), rows.labels.copy()
    ids[3] += 1
    labels[0] += 1
    changed = [rows._replace(ids=ids), rows._replace(labels=labels), rows._replace(labels=None)]
    assert len({r.fingerprint() for r in (rows, *changed)}) == 4
