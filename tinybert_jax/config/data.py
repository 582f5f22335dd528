"""The settings of plain text: a run's corpus and tokenizer, and `tinybert data prepare`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tinybert_jax.settings.section import Fraction, Positive, PositiveInt, Probability, Section


class PrepareConfig(Section):
    """Text, a tokenizer and a folder to write. What is not marked (*) changes the bytes."""

    output: str = Field(description="(*) the folder of the store; OUTPUT.partial until it is whole")
    sources: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description=".txt, .jsonl, .tsv, .csv, .parquet, also .gz .bz2 .xz .zst; folders and globs "
        "of them; a saved `datasets` folder; hub:owner/name[:config]"
    )
    tokenizer: str = Field(description="a tokenizer's folder or hub id")
    text: str = Field("text", description="column of the text; a position, from 0, where no header")
    split: str | None = Field(None, description="of a datasets folder or hub id")
    document_end: Literal["blank_line", "line"] = Field(
        "blank_line", description="what ends a document of a .txt file"
    )
    mode: Literal["documents", "pairs"] = Field(
        "documents",
        description="documents: rows filled with pieces of documents, each a segment; "
        "pairs: BERT's instances, a row each, of two runs of sentences",
    )
    pair_label: Literal["next_sentence", "sentence_order"] = Field(
        "next_sentence",
        description="label 1: the second run is from another document, or comes first in the text",
    )
    short_share: Fraction = Field(0.1, description="share of pairs of a random shorter length")
    width: Annotated[int, Field(ge=8, le=32768)] = 128
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    chunk_bytes: Annotated[int, Field(ge=256)] = Field(
        4 * 2**20, description="text that is tokenised, packed and shuffled together"
    )
    shard_rows: PositiveInt = 2**22
    max_bad_share: Fraction = Field(
        0.01, description="(*) stops when a larger share of the records cannot be read"
    )
    engine: Literal["processes", "ray"] = Field(
        "processes", description="(*) ray: Ray Data, on one machine or a cluster (extra `ray`)"
    )
    workers: PositiveInt | None = Field(None, description="(*) default: the CPU cores")

    def transform(self) -> dict:
        """The settings that decide what a text becomes."""
        free = {"output", "sources", "tokenizer", "max_bad_share", "engine", "workers"}
        return self.model_dump(mode="json", exclude=free)


class TokenizerSection(Section):
    """The teacher's own by default; another folder's; or a WordPiece trained on the corpus."""

    path: str | None = None
    vocab_size: PositiveInt | None = None
    lowercase: bool = True


class CorpusSection(Section):
    """Plain text: .txt (blank lines part documents), .jsonl with `text`; folders and globs."""

    files: tuple[str, ...] = ()
    stores: dict[str, Positive] = Field(
        {},
        description="instead of text: folders that `tinybert data prepare` wrote, and each one's "
        "share of the rows of a batch",
    )
    heldout_store: str | None = Field(None, description="a store that pretrain is evaluated on")
    builtin: bool = False
    max_documents: PositiveInt | None = None
    heldout_share: Probability = Field(
        0.0,
        description="share of the documents, by the hash of their text, that no stage trains on: "
        "pretrain tells its perplexity on them",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "CorpusSection":
        if [bool(self.files), bool(self.stores), self.builtin].count(True) != 1:
            raise ValueError("expected files, stores or builtin: true, exactly one of them")
        if self.stores and (self.max_documents or self.heldout_share):
            raise ValueError(
                "stores hold rows, not documents: remove max_documents and heldout_share (give "
                "heldout_store instead)"
            )
        if self.heldout_store and not self.stores:
            raise ValueError("heldout_store is for stores; text has heldout_share")
        if self.heldout_store in self.stores:
            raise ValueError(f"heldout_store: {self.heldout_store} is trained on; give another")
        return self
