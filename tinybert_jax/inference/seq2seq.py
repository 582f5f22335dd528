"""The public class of encoder-decoders, and translation of lines of text with it."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.batches.tokenize import MIN_TOKENS
from tinybert_jax.data.errors import short
from tinybert_jax.data.json_text import is_utf8
from tinybert_jax.data.wordpiece import decode_texts, plain_backend
from tinybert_jax.huggingface.encoder_decoder import (
    Tokenizers,
    check_tables,
    load_encoder_decoder,
    load_tokenizers,
    save_encoder_decoder,
    warm_start,
)
from tinybert_jax.huggingface.hub import has_tokenizer, load_tokenizer
from tinybert_jax.inference.pretrained import ModelOutput, checked_ids
from tinybert_jax.models import decoding
from tinybert_jax.models.decoding import Decoding
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import Params, frozen_params
from tinybert_jax.models.seq2seq import Seq2SeqOutput, bind_seq2seq, make_seq2seq
from tinybert_jax.settings.sizes import EncoderDecoderConfig, ModelConfig

_WIDTHS = (8, 16, 32, 64, 128, 256)  # sources are padded to these, so that few programs compile


class TinyBertForConditionalGeneration:
    """An encoder and a decoder of text, in the form of `EncoderDecoderModel` in transformers.

    Outputs of a call: `logits` [batch, target, vocab]; `encoder_last_hidden_state`;
    `encoder_hidden_states` and `decoder_hidden_states` of all layers.
    """

    def __init__(
        self, config: EncoderDecoderConfig, params: Params, tokenizers: Tokenizers | None = None
    ):
        self.config, self.params, self.tokenizers = config, params, tokenizers

    @functools.cached_property
    def _decoded_params(self) -> Params:
        """The parameters on the device, layer by layer."""
        return jax.device_put(frozen_params(self.params, dtype=jnp.float32, unroll=True))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "TinyBertForConditionalGeneration":
        """Reads a Hugging Face folder or hub id; raises ValueError for one that is not supported.

        The folder has to name `decoder_start_token_id`, `eos_token_id` and `pad_token_id`.
        """
        loaded = load_encoder_decoder(path)
        if not has_tokenizer(loaded.folder):
            return cls(loaded.config, loaded.params)
        tokens = load_tokenizers(loaded.folder)
        check_tables(tokens, loaded.config, "the model")
        return cls(loaded.config, loaded.params, tokens)

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder: str | Path,
        decoder: str | Path | None = None,
        *,
        decoder_layers: Sequence[int] | None = None,
        seed: int = 0,
    ) -> "TinyBertForConditionalGeneration":
        """Starts from two encoder folders, or from one for both sides, to be trained.

        The decoder has the layers `decoder_layers` (from 1; default: all) of its folder;
        cross-attention starts at random. [CLS] starts a target and [SEP] ends it.
        """
        decoder = encoder if decoder is None else decoder
        source = target = load_tokenizer(encoder)
        if decoder != encoder:
            target = load_tokenizer(decoder)

        def init(config: EncoderDecoderConfig) -> Params:
            return jax.jit(make_seq2seq(config).init)(jax.random.key(seed))

        ids = _special_ids(target)
        config, params = warm_start(encoder, decoder, init, decoder_layers=decoder_layers, **ids)
        tokens = Tokenizers(source, target)
        check_tables(tokens, config, "the model")
        return cls(config, params, tokens)

    @classmethod
    def from_sizes(
        cls,
        encoder: ModelConfig,
        decoder: ModelConfig,
        tokenizer: Any,
        decoder_tokenizer: Any = None,
        *,
        seed: int = 0,
    ) -> "TinyBertForConditionalGeneration":
        """Starts at random, to be trained; the two vocabulary sizes are those of the tokenizers."""
        tokens = Tokenizers(tokenizer, decoder_tokenizer or tokenizer)
        config = EncoderDecoderConfig(
            encoder=encoder.model_copy(update={"vocab_size": len(tokens.source)}),
            decoder=decoder.model_copy(update={"vocab_size": len(tokens.target)}),
            **_special_ids(tokens.target),
        )
        params = jax.jit(make_seq2seq(config).init)(jax.random.key(seed))
        return cls(config, params, tokens)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        decoder_input_ids: Any,
        decoder_attention_mask: Any = None,
    ) -> ModelOutput:
        """A forward pass without dropout; `logits` are those of the token after each target token.

        Default masks: all ones. Raises ValueError for inputs as `TinyBertModel` does.
        """
        ids, mask = _side("", input_ids, attention_mask, self.config.encoder)
        target = _side("decoder_", decoder_input_ids, decoder_attention_mask, self.config.decoder)
        output = _forward(self.config, self.params, _text(ids), mask, *target)
        assert output.encoder is not None and output.decoder is not None
        return ModelOutput(
            logits=output.logits,
            encoder_last_hidden_state=output.encoder.hidden[-1],
            encoder_hidden_states=output.encoder.hidden,
            decoder_hidden_states=output.decoder.hidden,
        )

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> np.ndarray:
        """int32 [batch, length]: targets from the start token on, filled up with padding.

        The settings are those of `generate` in transformers, whose tokens come out with greedy and
        beam search. Default `max_new_tokens`: twice the longest source, and 16. A program compiles
        for each new setting, and for each power of two of the numbers of rows and of tokens.
        """
        ids, mask = _side("", input_ids, attention_mask, self.config.encoder)
        num_rows, length = ids.shape
        positions = self.config.decoder.max_position_embeddings
        if max_new_tokens is None:
            max_new_tokens = min(positions, 2 * self._width(length) + 16)
        how = Decoding(
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            length_penalty=float(length_penalty),
            early_stopping=early_stopping,
            do_sample=do_sample,
            temperature=float(temperature),
            top_k=top_k,
            top_p=float(top_p),
        )
        _check(how, positions, self.config.decoder.vocab_size)
        rows, width = 1 << (num_rows - 1).bit_length(), self._width(length)
        pads = ((0, rows - num_rows), (0, width - length))
        source = _text(np.pad(ids, pads, constant_values=self.config.encoder.pad_token_id))
        key, params = jax.random.key(seed), self._decoded_params
        found = _generate(self.config, how, params, source, np.pad(mask, pads), key)
        found = np.asarray(found)[:num_rows]
        is_filled = (found != self.config.pad_token_id).any(axis=0)
        return found[:, : max(1, int(np.flatnonzero(is_filled).max(initial=0)) + 1)]

    def save_pretrained(self, folder: str | Path, tokenizers: Tokenizers | None = None) -> Path:
        """Writes a folder that `EncoderDecoderModel` loads, then reads it back and compares.

        Raises ValueError without tokenizers.
        """
        tokenizers = tokenizers or self.tokenizers
        if tokenizers is None:
            raise ValueError("save_pretrained: expected tokenizers, got none; pass tokenizers=…")
        return save_encoder_decoder(folder, self.params, self.config, tokenizers)

    def _width(self, length: int) -> int:
        """The width that sources of so many tokens are padded to."""
        most = self.config.encoder.max_position_embeddings
        return next((width for width in _WIDTHS if length <= width <= most), most)


class Translations(NamedTuple):
    """Translated lines, in the order of the sources."""

    lines: list[str]  # "" for a blank source
    num_blank: int
    num_cut: int  # sources that were longer than the encoder's positions
    num_unknown: int  # sources with characters that the vocabulary lacks

    def describe(self) -> str:
        """A line about sources that were not read whole; empty without any."""
        counts = {
            "blank, and stay so": self.num_blank,
            "cut at the model's length": self.num_cut,
            "with characters that the vocabulary lacks": self.num_unknown,
        }
        shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f"of {len(self.lines)} lines: {shown}" if shown else ""


def translate(
    model: TinyBertForConditionalGeneration,
    lines: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    **settings: Any,
) -> Translations:
    """A line for each line; `settings`: those of `generate`.

    Sources are cut to `max_length` tokens (default: the positions of the encoder) and decoded
    sorted by length. Raises ValueError for a model without tokenizers.
    """
    if model.tokenizers is None:
        raise ValueError("expected a folder with tokenizer files, got none; copy them into it")
    source, target = model.tokenizers
    positions = model.config.encoder.max_position_embeddings
    most = positions if max_length is None else max_length
    if not MIN_TOKENS <= most <= positions:
        raise ValueError(
            f"max_length: expected at least {MIN_TOKENS} and at most {positions} (the encoder's "
            f"positions), got {max_length}; change it"
        )
    wrong = [number for number, line in enumerate(lines, 1) if not is_utf8(line)]
    if wrong:
        got = short(lines[wrong[0] - 1])
        raise ValueError(f"text {wrong[0]}: expected UTF-8, got {got}; convert the text")
    backend = plain_backend(source)
    backend.enable_truncation(most)
    filled = [place for place, line in enumerate(lines) if line.strip()]
    encoded = backend.encode_batch([lines[place] for place in filled])
    order = sorted(range(len(filled)), key=lambda number: -len(encoded[number].ids))
    found = [""] * len(lines)
    for begin in range(0, len(order), batch_size):
        part = order[begin : begin + batch_size]
        rows = [encoded[number].ids for number in part]
        mask = np.arange(len(rows[0]))[None] < np.array([len(row) for row in rows])[:, None]
        ids = np.full(mask.shape, source.pad_token_id, np.int32)
        ids[mask] = np.concatenate(rows)
        words = model.generate(ids, mask, **settings)
        for number, text in zip(part, decode_texts(target, words), strict=True):
            found[filled[number]] = text
    unknown = source.unk_token_id
    return Translations(
        lines=found,
        num_blank=len(lines) - len(filled),
        num_cut=sum(bool(own.overflowing) for own in encoded),
        num_unknown=sum(unknown in own.ids for own in encoded),
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    config: EncoderDecoderConfig,
    params: Params,
    source: Text,
    mask: jax.Array,
    target_ids: jax.Array,
    target_mask: jax.Array,
) -> Seq2SeqOutput:
    target = {"decoder_input_ids": target_ids, "decoder_attention_mask": target_mask}
    return make_seq2seq(config).apply(params, source, mask, None, **target, taps=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    config: EncoderDecoderConfig,
    how: Decoding,
    params: Params,
    source: Text,
    mask: jax.Array,
    key: jax.Array,
) -> jax.Array:
    model = bind_seq2seq(config, params, unroll=True)
    return decoding.generate(model, config, source, mask, how, key)


def _text(ids: np.ndarray) -> Text:
    return Text(jnp.asarray(ids), jnp.zeros(ids.shape, jnp.int32))


def _side(prefix: str, ids: Any, mask: Any, sizes: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) of the source or the target; raises ValueError for what the model cannot read."""
    fix = "; use the tokenizer that belongs to the model"
    ids = checked_ids(f"{prefix}input_ids", ids, below=sizes.vocab_size, fix=fix)
    if ids.shape[1] > sizes.max_position_embeddings:
        raise ValueError(
            f"{prefix}input_ids: expected at most {sizes.max_position_embeddings} positions, got "
            f"{ids.shape[1]}; tokenize with truncation=True"
        )
    if mask is None:
        return ids, np.ones(ids.shape, bool)
    return ids, checked_ids(f"{prefix}attention_mask", mask, below=2, like=ids).astype(bool)


def _check(how: Decoding, positions: int, vocab_size: int) -> None:
    """Raises ValueError for settings that mean nothing."""
    wanted = {
        "max_new_tokens": (1 <= how.max_new_tokens <= positions, f"from 1 to {positions}"),
        "num_beams": (1 <= how.num_beams <= vocab_size // 2, f"from 1 to {vocab_size // 2}"),
        "temperature": (how.temperature > 0, "above 0"),
        "top_k": (how.top_k >= 0, "0 (all) or more"),
        "top_p": (0 < how.top_p <= 1, "above 0 and at most 1"),
    }
    for name, (is_fine, expected) in wanted.items():
        if not is_fine:
            raise ValueError(
                f"{name}: expected a number {expected}, got {getattr(how, name)}; change it"
            )
    if how.do_sample and how.num_beams > 1:
        raise ValueError(
            f"do_sample: expected num_beams 1 for drawn tokens, got {how.num_beams}; choose one"
        )


def _special_ids(tokenizer: Any) -> dict[str, int]:
    return {
        "decoder_start_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
