"""The settings of text without labels: corpus, tokenizer and `tinybert data prepare`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tinybert_jax.settings.section import Fraction, Positive, PositiveInt, Probability, Section


class PrepareConfig(Section):
    """The settings of `tinybert data prepare`; all except those marked (*) change the bytes."""

    output: str = Field(
        description="(*) the folder of the store; OUTPUT.partial until it is complete"
    )
    sources: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description=".txt, .jsonl, .tsv, .csv, .parquet, also .gz .bz2 .xz .zst; folders and globs "
        "of them; a saved `datasets` folder; hub:owner/name[:config]"
    )
    tokenizer: str = Field(description="a tokenizer's folder or hub id")
    text: str = Field(
        "text", description="column of the text: its name, or its position from 0 without a header"
    )
    split: str | None = Field(None, description="split of a datasets folder or hub data set")
    document_end: Literal["blank_line", "line"] = Field(
        "blank_line", description="end of a document in a .txt file"
    )
    mode: Literal["documents", "pairs"] = Field(
        "documents",
        description="documents: rows filled with pieces of documents, each piece a segment; "
        "pairs: BERT's sentence pairs, one row with two groups of sentences each",
    )
    pair_label: Literal["next_sentence", "sentence_order"] = Field(
        "next_sentence",
        description="label 1: the second group is from another document (next_sentence), or comes "
        "first in the text (sentence_order)",
    )
    short_share: Fraction = Field(0.1, description="share of pairs with a random shorter length")
    width: Annotated[int, Field(ge=8, le=32768)] = Field(128, description="tokens of a row")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="seed of the pairs and of the order of rows"
    )
    chunk_bytes: Annotated[int, Field(ge=256)] = Field(
        4 * 2**20, description="bytes of text that are tokenised, packed and shuffled together"
    )
    shard_rows: PositiveInt = Field(2**22, description="most rows of a file of the store")
    max_bad_share: Fraction = Field(
        0.01, description="(*) stops when a larger share of the records cannot be read"
    )
    engine: Literal["processes", "ray"] = Field(
        "processes", description="(*) ray: Ray Data, on one machine or a cluster (extra `ray`)"
    )
    workers: PositiveInt | None = Field(None, description="(*) default: the CPU cores")

    def transform(self) -> dict:
        """The settings that change the bytes of the store."""
        free = {"output", "sources", "tokenizer", "max_bad_share", "engine", "workers"}
        return self.model_dump(mode="json", exclude=free)


class TokenizerSection(Section):
    """The tokenizer: the teacher's (default), that of a folder, or one trained on the corpus."""

    path: str | None = Field(
        default=None, description="a folder or hub id; default: the teacher's folder"
    )
    vocab_size: PositiveInt | None = Field(
        default=None,
        description="instead of path: trains a WordPiece vocabulary of this size on corpus, or on "
        "both sides of a translation",
    )
    lowercase: bool = Field(
        default=True, description="lower-case text without accents, for trained vocabularies"
    )
    target_path: str | None = Field(
        default=None,
        description="of a translation's targets; default: as path has it, else both sides have one",
    )
    target_vocab_size: PositiveInt | None = Field(
        default=None,
        description="instead of target_path: trains a vocabulary of this size on the targets alone",
    )


class CorpusSection(Section):
    """Text: .txt (blank lines separate documents), .jsonl with `text`, folders, globs, stores."""

    files: tuple[str, ...] = Field((), description="files, folders and globs of text")
    stores: dict[str, Positive] = Field(
        {},
        description="instead of files: folders that `tinybert data prepare` wrote, with the "
        "relative number of rows that a batch takes from each folder",
    )
    heldout_store: str | None = Field(None, description="a store to evaluate pretrain on")
    builtin: bool = Field(
        False, description="instead of files: docstrings of the packages that are installed"
    )
    max_documents: PositiveInt | None = Field(None, description="the first documents of files")
    heldout_share: Probability = Field(
        0.0,
        description="share of the documents, chosen by hash of the text, that no stage trains on; "
        "pretrain reports its perplexity on them",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "CorpusSection":
        if [bool(self.files), bool(self.stores), self.builtin].count(True) != 1:
            raise ValueError(
                "expected files, stores or builtin: true, exactly one; set one of them"
            )
        if self.stores and (self.max_documents or self.heldout_share):
            raise ValueError(
                "stores hold rows, not documents: remove max_documents and heldout_share (set "
                "heldout_store instead)"
            )
        if self.heldout_store and not self.stores:
            raise ValueError("heldout_store is for stores: set heldout_share instead")
        if self.heldout_store in self.stores:
            raise ValueError(
                f"heldout_store: {self.heldout_store} is trained on; set another store"
            )
        return self
