"""Reads and writes folders of `EncoderDecoderModel` with a decoder of the class BertLMHeadModel.

The tokenizer of the sources stands in the folder itself. Where targets have another vocabulary,
theirs stands in `decoder_tokenizer`, which transformers does not look at.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from pydantic import ValidationError

from tinybert_jax.huggingface.bert import BERT
from tinybert_jax.huggingface.config_json import read_config
from tinybert_jax.huggingface.families import format_of
from tinybert_jax.huggingface.folder import (
    convert_params,
    read_model,
    start_params,
    write_folder,
    write_json,
)
from tinybert_jax.huggingface.hub import (
    check_same_pieces,
    check_table,
    find_folder,
    load_tokenizer,
    save_tokenizer,
)
from tinybert_jax.huggingface.tensors import WEIGHTS, open_tensors
from tinybert_jax.huggingface.untrusted import CONFIG, check_folder, read_json, shorten
from tinybert_jax.huggingface.weights import Format, from_hf, linear, norm, our_shapes, to_hf
from tinybert_jax.models.params import Params, flatten, unflatten
from tinybert_jax.models.seq2seq import make_seq2seq
from tinybert_jax.settings.sizes import EncoderDecoderConfig, ModelConfig, Sizes

MODEL_TYPE = "encoder-decoder"
DECODER_TOKENIZER = "decoder_tokenizer"
GENERATION = "generation_config.json"
_IDS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
_LAYER = "decoder.bert.encoder.layer.{i}.crossattention"
_CROSS = (
    *linear("decoder/layers/cross_attention/query", f"{_LAYER}.self.query"),
    *linear("decoder/layers/cross_attention/key", f"{_LAYER}.self.key"),
    *linear("decoder/layers/cross_attention/value", f"{_LAYER}.self.value"),
    *linear("decoder/layers/cross_attention/output", f"{_LAYER}.output.dense"),
    *norm("decoder/layers/cross_norm", f"{_LAYER}.output.LayerNorm"),
    *linear("bridge", "enc_to_dec_proj"),
)
# Where the parts of a masked LM stand in an encoder-decoder.
_DECODER_PARTS = {"encoder/": "decoder/", "decoder/bias": "output/bias"}


class Tokenizers(NamedTuple):
    """How text becomes ids, and ids text."""

    source: Any
    target: Any  # the same object where both have one vocabulary


class EncoderDecoder(NamedTuple):
    """The content of a folder."""

    folder: Path
    config: EncoderDecoderConfig
    params: Params


def is_encoder_decoder(path: str | Path) -> bool:
    """Whether a local folder or hub id says that it is an encoder-decoder."""
    file = find_folder(path) / CONFIG
    return file.is_file() and read_json(file).get("model_type") == MODEL_TYPE


def start_any(
    path: str | Path | None,
    init: Callable[[Any], Mapping[str, Any]],
    key: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """`folder.start_params`, also of a folder of an encoder-decoder, which is always whole."""
    if path is not None and is_encoder_decoder(path):
        return dict(load_encoder_decoder(path).params)
    return start_params(path, init, key, **options)


def load_encoder_decoder(path: str | Path) -> EncoderDecoder:
    """Reads a local folder or hub id; raises ValueError for one that is not supported.

    All weights have to be there, except those of the encoder's pooler, which nothing reads.
    """
    folder = find_folder(path)
    check_folder(folder)
    config = _read_config(folder)
    form, tensors = _format(config.encoder.model_type), open_tensors(folder)
    _, init = make_seq2seq(config)
    abstract = flatten(jax.eval_shape(init, jax.random.key(0)))
    shapes = {path: tuple(leaf.shape) for path, leaf in abstract.items()}
    try:
        flat, missing, surplus = from_hf(form, tensors, shapes)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    absent = [path for path in missing if not path.startswith("encoder/pooler/")]
    if absent or surplus:
        raise ValueError(
            f"{folder}: expected the weights that {CONFIG} describes, got a folder without "
            f"{shorten(absent[:4])} and with more: {shorten(list(surplus[:4]))}; copy it again, or "
            "use another model"
        )
    for path in missing:
        flat[path] = np.zeros(shapes[path], np.float32)
    return EncoderDecoder(folder, config, unflatten({path: flat[path] for path in shapes}))


def load_tokenizers(path: str | Path) -> Tokenizers:
    """The tokenizers of a local folder or hub id, one for both sides where it has but one."""
    folder, source = find_folder(path), load_tokenizer(path)
    own = folder / DECODER_TOKENIZER
    return Tokenizers(source, load_tokenizer(own) if own.is_dir() else source)


def check_tables(tokenizers: Tokenizers, config: Sizes, owner: str) -> None:
    """Raises ValueError for tokenizers that do not fit the word tables of a model."""
    if not isinstance(config, EncoderDecoderConfig):
        check_table(tokenizers.source, config, owner)
        return
    check_table(tokenizers.source, config.encoder, f"{owner}'s encoder")
    check_table(tokenizers.target, config.decoder, f"{owner}'s decoder")


def check_tokenizers(tokenizers: Tokenizers, path: str | Path, role: str) -> None:
    """Raises ValueError for a model folder with other pieces or ids than these."""
    check_same_pieces(tokenizers.source, path, role)
    if is_encoder_decoder(path):
        own = find_folder(path) / DECODER_TOKENIZER
        check_same_pieces(tokenizers.target, own if own.is_dir() else path, role)


def warm_start(
    encoder: str | Path,
    decoder: str | Path,
    init: Callable[[EncoderDecoderConfig], Mapping[str, Any]],
    *,
    decoder_layers: Sequence[int] | None = None,
    **ids: int,
) -> tuple[EncoderDecoderConfig, Params]:
    """Sizes and parameters from two encoder folders (which may be the same).

    The decoder has the layers of its folder, or those of `decoder_layers` (from 1), as well as its
    embeddings and, if it has one, its masked-LM head. Cross-attention and other weights that the
    folders lack come from `init`. `ids`: those of `EncoderDecoderConfig`.
    """
    sources = [read_model(path) for path in (encoder, decoder)]
    sizes = sources[1].config
    if sizes.model_type is not None:
        raise ValueError(
            f"{decoder}: expected a folder of the family {format_of(None).class_prefix} for the "
            f"decoder, got {sizes.model_type}; use another folder"
        )
    layers = tuple(decoder_layers or range(1, sizes.num_hidden_layers + 1))
    if not all(1 <= layer <= sizes.num_hidden_layers for layer in layers):
        raise ValueError(
            f"decoder_layers: expected layers from 1 to {sizes.num_hidden_layers} (those of "
            f"{decoder}), got {list(layers)}; correct them"
        )
    sizes = sizes.model_copy(update={"num_hidden_layers": len(layers)})
    config = EncoderDecoderConfig(encoder=sources[0].config, decoder=sizes, **ids)
    flat = {path: np.asarray(leaf) for path, leaf in flatten(init(config)).items()}
    for place, source in enumerate(sources):
        form = format_of(source.config.model_type)
        held = our_shapes(form, source.tensors, source.config.num_hidden_layers)
        for path, leaf in convert_params(source, held).flat.items():
            renamed = _in_decoder(path) if place else path
            is_kept = renamed in flat and (place == 1 or path.startswith("encoder/"))
            if is_kept and place and "/layers/" in path:
                leaf = leaf[np.array(layers) - 1]
            if is_kept:
                flat[renamed] = leaf
    return config, unflatten(flat)


def save_encoder_decoder(
    folder: str | Path,
    params: Mapping[str, Any],
    config: EncoderDecoderConfig,
    tokens: Tokenizers,
    extra: Mapping[str, Callable[[Path], None]] | None = None,
) -> Path:
    """Writes a folder that `EncoderDecoderModel.from_pretrained` loads, and reads it back.

    `extra`: further files, each by a function that writes it. As with `save_model`, the folder
    appears complete or not at all.
    """
    from safetensors.numpy import save_file

    folder = Path(os.path.expanduser(folder))
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()}
    tensors = to_hf(_format(config.encoder.model_type), flat)

    def write(partial: Path) -> None:
        save_tokenizer(tokens.source, partial, config.encoder)
        if tokens.target is not tokens.source:
            (partial / DECODER_TOKENIZER).mkdir()
            save_tokenizer(tokens.target, partial / DECODER_TOKENIZER, config.decoder)
        write_json(partial / CONFIG, _config_json(config))
        ids = {name: getattr(config, name) for name in _IDS}
        most = config.decoder.max_position_embeddings
        write_json(partial / GENERATION, {**ids, "max_length": most})
        save_file(tensors, str(partial / WEIGHTS), metadata={"format": "pt"})
        for name, write_own in (extra or {}).items():
            write_own(partial / name)

    def check(partial: Path) -> None:
        again = load_encoder_decoder(partial)
        held = flatten(again.params)
        same = again.config == config and held.keys() == flat.keys()
        if not same or any(not np.array_equal(held[path], leaf) for path, leaf in flat.items()):
            raise ValueError(
                f"{folder}: the saved weights or sizes differ when read back; check the disk"
            )

    return write_folder(folder, write, check)


@functools.cache
def _format(encoder_type: str | None) -> Format:
    """The names of all weights of an encoder-decoder with an encoder of this family."""
    own = format_of(encoder_type)
    encoder = [
        entry._replace(name="encoder." + entry.name.removeprefix(own.base_prefix))
        for entry in own.table
        if entry.path.startswith("encoder/") and "/pooler/" not in entry.path
    ]
    if own.holds_pooler(None):
        encoder += linear("encoder/pooler", "encoder.pooler.dense")
    decoder = [
        entry._replace(path=_in_decoder(entry.path), name="decoder." + entry.name)
        for entry in BERT.table
        if entry.path.startswith(("encoder/embeddings", "encoder/layers", "transform", "norm"))
        or entry.path == BERT.output_bias
    ]
    return BERT._replace(
        base_prefix="model.",  # no name begins so: all are whole
        table=(*encoder, *decoder, *_CROSS),
        decoder="decoder.cls.predictions.decoder",
        word_table="decoder/embeddings/word/embedding",
        output_bias=_in_decoder(BERT.output_bias),
        pair_head=None,
    )


def _in_decoder(path: str) -> str:
    """The path of a masked LM's parameter in the decoder of an encoder-decoder."""
    for old, new in _DECODER_PARTS.items():
        if path.startswith(old):
            return new + path.removeprefix(old)
    return path


def _read_config(folder: Path) -> EncoderDecoderConfig:
    raw, place = read_json(folder / CONFIG), folder / CONFIG
    if raw.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{place}: expected the model_type {MODEL_TYPE!r}, got "
            f"{shorten(raw.get('model_type'))}; use a folder of an encoder-decoder, or start one "
            "from encoders with from_encoder_decoder_pretrained"
        )
    parts = {name: _part(raw, name, place) for name in ("encoder", "decoder")}
    if parts["decoder"].get("model_type") != _part_type(BERT):
        raise ValueError(
            f"{place}: expected a decoder of the model_type {_part_type(BERT)!r}, got "
            f"{shorten(parts['decoder'].get('model_type'))}; use another model"
        )
    for name in ("is_decoder", "add_cross_attention"):
        if parts["decoder"].pop(name, None) is not True:
            raise ValueError(
                f"{place}: expected a decoder with {name} true, got none: it would see the words "
                "that it is to predict, or no source; correct it, or use another model"
            )
    if parts["decoder"].get("cross_attention_hidden_size") is not None:
        raise ValueError(
            f"{place}: expected no cross_attention_hidden_size in the decoder, got "
            f"{shorten(parts['decoder']['cross_attention_hidden_size'])}; use another model"
        )
    sizes: dict[str, Any] = {name: read_config(part, folder) for name, part in parts.items()}
    try:
        return EncoderDecoderConfig(**sizes, **_ids(raw, folder))
    except ValidationError as error:
        found = "; ".join(e["msg"] for e in error.errors())
        raise ValueError(f"{place}: {found}; correct it") from None


def _part(raw: Mapping[str, Any], name: str, place: Path) -> dict[str, Any]:
    part = raw.get(name)
    if not isinstance(part, dict):
        raise ValueError(
            f"{place}: expected the settings of the {name}, got {shorten(part)}; copy it again"
        )
    return dict(part)


def _part_type(form: Format) -> str:
    return form.write_config(ModelConfig())["model_type"]


def _ids(raw: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """The ids that decoding needs: those of generation_config.json, else of config.json."""
    generation = folder / GENERATION
    given = read_json(generation) if generation.is_file() else {}
    found = {}
    for name in _IDS:
        value = raw.get(name) if given.get(name) is None else given[name]
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if type(value) is not int:
            raise ValueError(
                f"{folder}: expected the id of a token as {name}, got {shorten(value)}; set it in "
                f"{CONFIG} (a tokenizer of BERT starts with [CLS] and ends with [SEP])"
            )
        found[name] = value
    return found


def _config_json(config: EncoderDecoderConfig) -> dict[str, Any]:
    encoder, decoder = config.encoder, BERT.write_config(config.decoder)
    is_causal = {"is_decoder": True, "add_cross_attention": True}
    return {
        "architectures": ["EncoderDecoderModel"],
        "model_type": MODEL_TYPE,
        "is_encoder_decoder": True,
        "encoder": format_of(encoder.model_type).write_config(encoder),
        "decoder": {**decoder, **is_causal, "tie_word_embeddings": True},
        **{name: getattr(config, name) for name in _IDS},
        "dtype": "float32",
    }
