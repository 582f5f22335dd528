"""The settings of `tinybert data prepare`: which text becomes token shards, and how.

Imports no JAX, as all sections.
"""

from typing import Annotated, Literal

from pydantic import Field

from tinybert_jax.fields import Fraction, PositiveInt, Section


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
