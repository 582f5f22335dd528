"""The public Python classes, which follow those of Hugging Face transformers.

Inputs: PyTorch, NumPy or JAX arrays, or nested lists. Outputs: JAX arrays, by key or attribute.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import PrivateAttr

from tinybert_jax.huggingface.families import format_of
from tinybert_jax.huggingface.folder import read_model, save_model, start_params
from tinybert_jax.huggingface.head import Head, inferred_problem_type, is_unnamed
from tinybert_jax.huggingface.hub import check_table, has_tokenizer, load_tokenizer
from tinybert_jax.models.families import DEFAULT
from tinybert_jax.models.heads import (
    Model,
    make_classifier,
    make_encoder,
    make_masked_lm,
    make_token_classifier,
)
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import Params
from tinybert_jax.settings.sizes import ModelConfig


class ModelOutput(dict):
    """Outputs by key and by attribute: `outputs["logits"]` and `outputs.logits`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            hint = (
                "" if "hidden_states" in self else "; TinyBertModel gives the states of all layers"
            )
            raise AttributeError(f"no output '{name}'; there are {list(self)}{hint}") from None


class LabelledConfig(ModelConfig):
    """The sizes of a model, with the names of its labels under the names of transformers.

    Equal to the sizes alone.
    """

    _label_names: tuple[str, ...] = PrivateAttr(())

    @classmethod
    def of(cls, sizes: ModelConfig, label_names: Sequence[str]) -> "LabelledConfig":
        config = cls.model_construct(**dict(sizes))
        config._label_names = tuple(label_names)
        return config

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each label by its id."""
        return dict(enumerate(self._label_names))

    @property
    def label2id(self) -> dict[str, int]:
        """The id of each label by its name."""
        return {name: number for number, name in self.id2label.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelConfig) and dict(self) == dict(other)


class TinyBertModel:
    """An encoder without a head.

    Outputs: `last_hidden_state` [batch, seq, dim]; `pooler_output` [batch, dim], None for a family
    whose encoder has no pooler; `hidden_states`, `attention_queries`, `attention_keys` and
    `attention_values` of all layers (see `EncoderOutput`).
    """

    head_kind: str | None = None  # end of the class name in transformers; None: no task head

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        label_names: tuple[str, ...] | None = None,
        tokenizer: Any = None,
        head: Head | None = None,
    ):
        self.config, self.params = LabelledConfig.of(config, label_names or ()), params
        self.label_names, self.tokenizer = label_names, tokenizer
        self.head = head  # as the folder had it; None: of a fresh head
        apply, _ = self._make(config, len(label_names or ()) or 1)
        self._forward = jax.jit(
            lambda params, inputs, mask: self._outputs(apply(params, inputs, mask))
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, *, label_names: tuple[str, ...] | None = None):
        """Reads a Hugging Face folder or hub id.

        Without the head of this class in the folder, the head has random weights, and a message
        says so; `label_names` sets its number of outputs. Raises ValueError for a folder that
        cannot be read, or whose head of this kind has other labels than `label_names`.
        """
        source = read_model(path)
        names = tuple(label_names or ()) or source.label_names
        head = source.head if source.head and source.head.kind == cls.head_kind else None
        trained = head.label_names if head else None
        is_named = trained and not is_unnamed(trained)
        if trained and names != trained and (is_named or len(names or ()) != len(trained)):
            raise ValueError(
                f"label_names: expected those of the head in {path}, {list(trained)}, got "
                f"{list(names or ())}; leave label_names out"
            )
        _, init = cls._make(source.config, len(names or ()) or 1)
        params = start_params(path, init)
        tokenizer = None  # only save_pretrained needs it, and raises without it
        if has_tokenizer(source.folder):
            tokenizer = load_tokenizer(source.folder)
            check_table(tokenizer, source.config, f"the model in {path}")
        return cls(source.config, params, names, tokenizer, head)

    def __repr__(self) -> str:
        """The class, the family, the sizes and the labels."""
        sizes, names = self.config, self.label_names or ()
        count = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(self.params))
        parts = [
            sizes.model_type or DEFAULT,
            f"{sizes.num_hidden_layers} layers × {sizes.hidden_size}",
            f"{sizes.num_attention_heads} heads",
            f"{sizes.vocab_size:,} words",
            f"{sizes.max_position_embeddings} positions",
            f"{count:,} parameters",
        ]
        if names and self.head_kind:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            parts.append(f"labels {shown}")
        return f"{type(self).__name__}({'; '.join(parts)})"

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        **unused: Any,
    ) -> ModelOutput:
        """A forward pass without dropout; all inputs are [batch, seq].

        A text, or a list of texts, in place of `input_ids` is tokenised, and cut where it is longer
        than the model's positions. Default `attention_mask`: all ones; default `token_type_ids`:
        all zeros. Raises ValueError for an input of another shape or type, or with ids that the
        model does not have, and for texts without a tokenizer.
        """
        if unused:
            raise ValueError(
                f"expected input_ids, attention_mask and token_type_ids, got also "
                f"{sorted(unused)}; remove them"
            )
        if isinstance(input_ids, str) or _are_texts(input_ids):
            if attention_mask is not None or token_type_ids is not None:
                raise ValueError(
                    "expected texts alone, got them with attention_mask or token_type_ids; leave "
                    "these out, or pass input_ids of the tokenizer"
                )
            return self(**self._tokenize(input_ids))
        ids = checked_ids(
            "input_ids",
            input_ids,
            below=self.config.vocab_size,
            fix="; use the tokenizer that belongs to the model",
        )
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids: expected at most {self.config.max_position_embeddings} positions, "
                f"got {ids.shape[1]}; tokenize with truncation=True"
            )
        mask, types = np.ones_like(ids), np.zeros_like(ids)
        if attention_mask is not None:
            mask = checked_ids("attention_mask", attention_mask, below=2, like=ids)
        if token_type_ids is not None:
            num_types = self.config.type_vocab_size
            fix = "" if num_types else "; the model has no token types: leave token_type_ids out"
            types = checked_ids(
                "token_type_ids", token_type_ids, below=num_types or 1, like=ids, fix=fix
            )
        return ModelOutput(
            self._forward(
                self.params, Text(jnp.asarray(ids), jnp.asarray(types)), mask.astype(bool)
            )
        )

    def _tokenize(self, texts: str | Sequence[str]) -> dict[str, Any]:
        if self.tokenizer is None:
            raise ValueError(
                "expected input_ids, got text for a model without a tokenizer; load a folder that "
                "has one, or pass the ids"
            )
        encoded = self.tokenizer(
            [texts] if isinstance(texts, str) else list(texts),
            padding=True,
            truncation=True,
            max_length=self.config.max_position_embeddings,
            return_tensors="np",
        )
        known = ["input_ids", "attention_mask"]
        known += ["token_type_ids"] if self.config.type_vocab_size else []
        return {name: encoded[name] for name in known if name in encoded}

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """Writes a folder that `AutoModel….from_pretrained` loads, then reads it back and compares.

        Raises ValueError without a tokenizer.
        """
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise ValueError("save_pretrained: expected a tokenizer; pass tokenizer=…")
        return save_model(
            folder,
            self.params,
            self.config,
            tokenizer,
            head=self._head(),
        )

    def _head(self) -> Head | None:
        if self.head_kind is None:
            return None
        names = self.label_names or ("LABEL_0",)
        if self.head is not None:
            return self.head._replace(label_names=names)
        return Head(self.head_kind, inferred_problem_type(self.head_kind, len(names)), names)

    @staticmethod
    def _make(config: ModelConfig, num_classes: int) -> Model:
        has_pooler = format_of(config.model_type).holds_pooler(None)
        return make_encoder(config, has_pooler=has_pooler)

    @staticmethod
    def _outputs(encoded: Any) -> dict[str, Any]:
        return {
            "last_hidden_state": encoded.hidden[-1],
            "pooler_output": encoded.pooled,
            "hidden_states": encoded.hidden,
            # Not "keys" and "values": as attributes these are methods of every dict.
            "attention_queries": encoded.queries,
            "attention_keys": encoded.keys,
            "attention_values": encoded.values,
        }


class TinyBertForMaskedLM(TinyBertModel):
    """An encoder with the masked-LM head: `logits` [batch, seq, vocab]."""

    @staticmethod
    def _make(config: ModelConfig, num_classes: int) -> Model:
        return make_masked_lm(config)

    @staticmethod
    def _outputs(encoded: Any) -> dict[str, Any]:
        return {"logits": encoded.logits}


class TinyBertForSequenceClassification(TinyBertForMaskedLM):
    """An encoder with a head for whole texts: `logits` [batch, num_labels]."""

    head_kind = "SequenceClassification"
    _make = staticmethod(make_classifier)


class TinyBertForTokenClassification(TinyBertForMaskedLM):
    """An encoder with a head for tokens: `logits` [batch, seq, num_labels]."""

    head_kind = "TokenClassification"
    _make = staticmethod(make_token_classifier)


def _are_texts(value: Any) -> bool:
    """Whether it is a list of texts, not empty."""
    is_list = isinstance(value, list | tuple) and len(value) > 0
    return is_list and all(isinstance(text, str) for text in value)


def checked_ids(
    name: str, values: Any, *, below: int, like: np.ndarray | None = None, fix: str = ""
) -> np.ndarray:
    """`values` as int32 [batch, seq]; raises ValueError for another shape, type or range.

    Values are whole numbers from 0 to `below` − 1; the shape is that of `like` if given.
    """
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(
            f"{name}: expected rows of one length, got several lengths; tokenize with padding=True"
        ) from None
    if like is not None and array.shape != like.shape:
        raise ValueError(
            f"{name}: expected the shape of input_ids {list(like.shape)}, got {list(array.shape)}; "
            "take both from one call of the tokenizer"
        )
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{name}: expected shape [batch, seq], got {list(array.shape)}; add a batch dim"
        )
    if not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise ValueError(
            f"{name}: expected whole numbers, got {array.dtype}; pass the tokenizer's output"
        )
    if not 0 <= array.min() <= array.max() < below:
        raise ValueError(
            f"{name}: expected numbers from 0 to {below - 1}, got {array.min()} to "
            f"{array.max()}{fix}"
        )
    return array.astype(np.int32)
