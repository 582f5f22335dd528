"""Scores of entities against a transcription of conlleval; conversions between the schemes."""

import itertools
from collections import Counter

import numpy as np
import pytest

from tinybert_jax.metrics.tagging import (
    Entity,
    convert_tags,
    detect_scheme,
    entities_of,
    entity_scores,
    entity_scores_per_kind,
    read_tags,
    scheme_mistakes,
    write_tags,
)

SCHEMES = ("iob1", "iob2", "bioes")
KINDS = ("PER", "creative-work", "E-S")
ALL_TAGS = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in KINDS)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# conlleval: the published rules as tables of (tag before, tag), and its pass over the words

ENDS = set("BB BS BO IB IS IO EE EI EO ES EB SE SI SO SS SB".split())
STARTS = set("BB IB OB SB EB BS IS OS SS ES OI SI EI OE SE EE".split())


def conlleval(gold, predicted):
    """Counters (correct, predicted, gold) by kind, and the number of words with equal tags."""
    correct, found, support, num_equal = Counter(), Counter(), Counter(), 0
    is_open, last_gold, last_guess = False, ("O", ""), ("O", "")

    def parse(tag):
        prefix, _, kind = tag.partition("-")
        return prefix, kind

    def ends(last, now):
        return last[0] + now[0] in ENDS or (last[0] != "O" and last[1] != now[1])

    def starts(last, now):
        return last[0] + now[0] in STARTS or (now[0] != "O" and last[1] != now[1])

    boundary = [("O", "O")]  # conlleval reads a blank line as one
    pairs = zip(gold, predicted, strict=True)
    for g, p in itertools.chain(*([*zip(*pair, strict=True), *boundary] for pair in pairs)):
        gold_now, guess_now = parse(g), parse(p)
        gold_ends, guess_ends = ends(last_gold, gold_now), ends(last_guess, guess_now)
        if is_open:
            if gold_ends and guess_ends and last_gold[1] == last_guess[1]:
                is_open = False
                correct[last_gold[1]] += 1
            elif gold_ends != guess_ends or gold_now[1] != guess_now[1]:
                is_open = False
        gold_starts, guess_starts = starts(last_gold, gold_now), starts(last_guess, guess_now)
        is_open |= gold_starts and guess_starts and gold_now[1] == guess_now[1]
        support[gold_now[1]] += gold_starts
        found[guess_now[1]] += guess_starts
        num_equal += gold_now == guess_now
        last_gold, last_guess = gold_now, guess_now
    return +correct, +found, +support, num_equal - len(gold)


def fractions(correct, found, support):
    precision = correct / found if found else 0.0
    recall = correct / support if support else 0.0
    total = precision + recall
    f1 = 2 * precision * recall / total if total else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def random_pairs(rng, num_sentences):
    """Gold and predicted tags, about half of them ill-formed; some sentences empty, some all O."""
    gold, predicted = [], []
    for length in rng.integers(0, 12, num_sentences):
        tags = rng.choice(ALL_TAGS, length) if rng.random() < 0.9 else np.full(length, "O")
        if rng.random() < 0.5:  # few tags, so that there are entities of several words
            tags = rng.choice(tags[:2], length) if length else tags
        guess = np.where(rng.random(length) < 0.2, rng.choice(ALL_TAGS, length), tags)
        gold.append([str(tag) for tag in tags])
        predicted.append([str(tag) for tag in guess])
    return gold, predicted


def test_scores_equal_conlleval_for_single_sentences_and_for_all(rng):
    gold, predicted = random_pairs(rng, 1000)
    assert [] in gold and any(set(tags) == {"O"} for tags in gold)
    assert sum(len(e) > 0 for e in map(entities_of, gold)) > 500
    single = [([g], [p]) for g, p in zip(gold, predicted, strict=True) if g]
    for golds, guesses in [*single, (gold, predicted)]:
        correct, found, support, num_equal = conlleval(golds, guesses)
        got = entity_scores(golds, guesses)
        assert got.keys() == {"precision", "recall", "f1", "accuracy"}
        expected = fractions(correct.total(), found.total(), support.total())
        assert got == pytest.approx(expected | {"accuracy": num_equal / sum(map(len, golds))})
        per_kind = entity_scores_per_kind(golds, guesses)
        assert list(per_kind) == sorted(found.keys() | support.keys())
        for kind, scores in per_kind.items():
            expected = fractions(correct[kind], found[kind], support[kind])
            counts = {"support": support[kind], "predicted": found[kind]}
            assert scores == pytest.approx(expected | counts)


def test_scores_equal_a_count_by_hand():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    predicted = [["B-PER", "I-PER", "O", "B-PER"], ["I-LOC", "I-LOC"]]
    # 3 gold and 3 predicted entities; only the first entity is in both.
    assert entity_scores(gold, predicted) == pytest.approx(
        {"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3, "accuracy": 3 / 6}
    )
    assert entity_scores_per_kind(gold, predicted) == {
        "LOC": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 2, "predicted": 1},
        "PER": pytest.approx(
            {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1, "predicted": 2}
        ),
    }


def test_undefined_scores_are_zero():
    outside, person = [["O", "O"]], [["I-PER", "O"]]
    zeros = {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert entity_scores(outside, outside) == zeros | {"accuracy": 1.0}
    assert entity_scores(outside, person) == zeros | {"accuracy": 0.5}
    assert entity_scores(person, outside) == zeros | {"accuracy": 0.5}
    assert entity_scores_per_kind(outside, outside) == {}


def test_scores_refuse_lengths_that_differ_and_empty_sets():
    for scores in (entity_scores, entity_scores_per_kind):
        with pytest.raises(ValueError, match="for 2 gold sentences, got 1; predict the whole"):
            scores([["O"], ["O"]], [["O"]])
        with pytest.raises(
            ValueError, match=r"7 of 8 sentences \(sentence 1: 1 instead of 2, .*, …\)"
        ):
            scores([["O"], *[["O", "O"]] * 7], [["O"]] * 8)
        for empty in ([], [[]], [[], []]):
            with pytest.raises(ValueError, match="at least one word, got none; check"):
                scores(empty, empty)


# Entities


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", []),
        ("O O", []),
        ("I-a I-a B-a I-b O I-a", [(0, 2, "a"), (2, 3, "a"), (3, 4, "b"), (5, 6, "a")]),
        ("B-a I-a B-a O", [(0, 2, "a"), (2, 3, "a")]),
        ("S-a B-a I-a E-a S-b", [(0, 1, "a"), (1, 4, "a"), (4, 5, "b")]),
        ("I-a I-b", [(0, 1, "a"), (1, 2, "b")]),  # ill-formed from here on
        ("B-a I-b I-b", [(0, 1, "a"), (1, 3, "b")]),
        ("E-a E-a I-a E-a", [(0, 1, "a"), (1, 2, "a"), (2, 4, "a")]),
        ("B-a O E-a", [(0, 1, "a"), (2, 3, "a")]),
        ("B-x-y I-x-y I-x", [(0, 2, "x-y"), (2, 3, "x")]),
    ],
)
def test_entities_equal_those_found_by_hand(tags, expected):
    assert entities_of(tags.split()) == expected


@pytest.mark.parametrize(
    "tag", ["", "B", "B-", "I- ", "X-PER", "b-PER", "o", "O-PER", "PER", "BPER"]
)
def test_tags_with_an_unknown_prefix_or_no_kind_are_refused(tag):
    expected = f"expected O, or B-, I-, E- or S- and a kind, got {tag!r}; correct"
    for call in (entities_of, lambda tags: entity_scores([tags], [tags])):
        with pytest.raises(ValueError, match=expected):
            call(["O", tag])
    with pytest.raises(ValueError, match=expected):
        detect_scheme([["O", tag]])
    for scheme in SCHEMES:
        assert scheme_mistakes(["O", tag], scheme) == [(1, repr(tag))]


# Schemes


def random_entities(rng):
    """Entities in order, often without a gap between them, and the length of their sentence."""
    entities, end = [], 0
    for _ in range(rng.integers(0, 6)):
        start = end + int(rng.choice([0, 0, 1, 3]))
        end = start + int(rng.integers(1, 5))
        entities.append(Entity(start, end, str(rng.choice(KINDS))))
    return entities, end + int(rng.integers(0, 3))


def test_entities_survive_every_scheme_and_every_conversion(rng):
    for _ in range(300):
        entities, length = random_entities(rng)
        written = {scheme: write_tags(entities[::-1], length, scheme) for scheme in SCHEMES}
        for source, target in itertools.product(SCHEMES, SCHEMES):
            assert convert_tags(written[source], source, target) == written[target]
        for scheme, tags in written.items():
            assert len(tags) == length
            assert read_tags(tags, scheme) == entities_of(tags) == entities


def test_written_tags_equal_those_written_by_hand():
    entities, length = [Entity(0, 2, "a"), Entity(2, 3, "a"), Entity(3, 6, "b")], 7
    assert write_tags(entities, length, "iob1") == "I-a I-a B-a I-b I-b I-b O".split()
    assert write_tags(entities, length, "iob2") == "B-a I-a B-a B-b I-b I-b O".split()
    assert write_tags(entities, length, "bioes") == "B-a E-a S-a B-b I-b E-b O".split()


def test_a_scheme_allows_exactly_the_tags_that_it_writes():
    """All sentences of up to 4 words: well-formed exactly if reading and writing keeps them."""
    tags = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in "ab")]
    for sentence in map(
        list, itertools.chain(*(itertools.product(tags, repeat=n) for n in range(5)))
    ):
        entities = entities_of(sentence)
        for scheme in ("iob2", "bioes"):
            is_written = sentence == write_tags(entities, len(sentence), scheme)
            assert is_written == (not scheme_mistakes(sentence, scheme)), (scheme, sentence)
        # iob1 may also separate neighbours of two kinds by B-, as some tools do.
        outside = ["O", *sentence]
        well_formed = not set("ES") & {tag[0] for tag in sentence} and not any(
            before == "O" and tag[0] == "B" for before, tag in itertools.pairwise(outside)
        )
        assert well_formed == (not scheme_mistakes(sentence, "iob1")), sentence


@pytest.mark.parametrize(
    ("scheme", "tags", "positions"),
    [
        ("iob1", "O B-a", "'B-a' after 'O' at position 1"),
        ("iob1", "B-a", "'B-a' at the start at position 0"),
        ("iob1", "S-a", "'S-a' at position 0"),
        ("iob2", "O I-a", "'I-a' after 'O' at position 1"),
        ("iob2", "I-a I-b", "'I-a' at the start at position 0, 'I-b' after 'I-a' at position 1"),
        ("bioes", "B-a O", "'O' after 'B-a' at position 1"),
        ("bioes", "O B-a", "'B-a' at the end at position 1"),
        ("bioes", "B-a E-b", "'E-b' after 'B-a' at position 1"),
        ("bioes", "S-a I-a E-a", "'I-a' after 'S-a' at position 1"),
    ],
)
def test_ill_formed_tags_are_refused_with_their_positions(scheme, tags, positions):
    for call in (read_tags, lambda tags, scheme: convert_tags(tags, scheme, "iob2")):
        with pytest.raises(ValueError) as caught:
            call(tags.split(), scheme)
        for part in (f"expected {scheme} tags (", f"({positions})", "; correct them or name"):
            assert part in str(caught.value)


def test_many_ill_formed_tags_are_counted():
    with pytest.raises(
        ValueError, match=r"got others at 7 of 7 positions \(('X' at position \d, ){5}…\)"
    ):
        read_tags(["X"] * 7, "iob2")


@pytest.mark.parametrize(
    "entities",
    [
        [Entity(0, 4, "a")],
        [Entity(-1, 1, "a")],
        [Entity(1, 1, "a")],
        [Entity(0, 2, "a"), Entity(1, 3, "b")],
        [Entity(0, 1, "")],
    ],
)
def test_entities_that_overlap_or_do_not_fit_are_refused(entities):
    with pytest.raises(ValueError, match="of one or more of 3 words, .* got Entity.*; correct"):
        write_tags(entities, 3, "iob2")


def test_the_scheme_of_written_tags_is_detected(rng):
    for _ in range(100):
        sentences = [random_entities(rng) for _ in range(5)]
        for scheme in SCHEMES:
            tags = [write_tags(entities, length, scheme) for entities, length in sentences]
            if any(entities for entities, _ in sentences):
                assert detect_scheme(tags) == scheme
    assert detect_scheme([]) == detect_scheme([["O"], []]) == "iob2"
    assert detect_scheme([["B-a", "I-a"], ["O", "I-a"]]) == "iob1"
    assert detect_scheme([["B-a", "I-a"], ["O", "S-a"]]) == "bioes"
