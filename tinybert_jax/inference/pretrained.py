"""The public Python face: Hugging Face-like classes over the pure functions.

Inputs: PyTorch, NumPy or JAX arrays, or nested lists. Outputs: JAX arrays, by key or attribute.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.huggingface.families import format_of
from tinybert_jax.huggingface.folder import read_model, save_model, start_params
from tinybert_jax.huggingface.head import Head, inferred_problem_type, is_unnamed
from tinybert_jax.huggingface.hub import load_tokenizer
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
    """`outputs["logits"]` and `outputs.logits`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output '{name}'; there are {list(self)}") from None


class TinyBertModel:
    """The bare encoder: `last_hidden_state`, `pooler_output`, and what distillation reads.

    `pooler_output` is None in a family whose bare encoder has no pooler.
    """

    head_kind: str | None = None  # as in the names of transformers' classes

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        label_names: tuple[str, ...] | None = None,
        tokenizer: Any = None,
        head: Head | None = None,
    ):
        self.config, self.params = config, params
        self.label_names, self.tokenizer = label_names, tokenizer
        self.head = head  # as the folder had it; None: of a fresh head
        apply, _ = self._make(config, len(label_names or ()) or 1)
        self._forward = jax.jit(
            lambda params, inputs, mask: self._outputs(apply(params, inputs, mask))
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, *, label_names: tuple[str, ...] | None = None):
        """Reads a Hugging Face folder or hub id.

        A folder without this class's head gets a fresh one, and says so; `label_names` sizes it.
        Raises ValueError where the folder is not a readable BERT, or where its head of this kind
        was trained with other labels.
        """
        source = read_model(path)
        names = tuple(label_names or ()) or source.label_names
        head = source.head if source.head and source.head.kind == cls.head_kind else None
        theirs = head.label_names if head else None
        is_named = theirs and not is_unnamed(theirs)
        if theirs and names != theirs and (is_named or len(names or ()) != len(theirs)):
            raise ValueError(
                f"label_names: expected those of the head in {path}, {list(theirs)}, got "
                f"{list(names or ())}; leave label_names out"
            )
        _, init = cls._make(source.config, len(names or ()) or 1)
        params = start_params(path, init)
        try:
            tokenizer = load_tokenizer(path)
        except ValueError:
            tokenizer = None  # only save_pretrained needs it, and says so
        return cls(source.config, params, names, tokenizer, head)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        **unused: Any,
    ) -> ModelOutput:
        """A deterministic forward pass of ids [batch, seq]; a mask of ones where none is given.

        Raises ValueError where an input has another shape, type or range than the model's.
        """
        if unused:
            raise ValueError(
                f"expected input_ids, attention_mask and token_type_ids, got also {sorted(unused)}"
            )
        ids = _checked(
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
            mask = _checked("attention_mask", attention_mask, below=2, like=ids)
        if token_type_ids is not None:
            num_types = self.config.type_vocab_size
            fix = "" if num_types else "; the model has no token types: leave token_type_ids out"
            types = _checked(
                "token_type_ids", token_type_ids, below=num_types or 1, like=ids, fix=fix
            )
        return ModelOutput(
            self._forward(
                self.params, Text(jnp.asarray(ids), jnp.asarray(types)), mask.astype(bool)
            )
        )

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """Writes a folder that `AutoModel….from_pretrained` loads; reads it back and compares."""
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
    """`logits` [batch, seq, vocab]."""

    @staticmethod
    def _make(config: ModelConfig, num_classes: int) -> Model:
        return make_masked_lm(config)

    @staticmethod
    def _outputs(encoded: Any) -> dict[str, Any]:
        return {"logits": encoded.logits}


class TinyBertForSequenceClassification(TinyBertForMaskedLM):
    """Scores of whole texts: `logits` [batch, num_labels]."""

    head_kind = "SequenceClassification"
    _make = staticmethod(make_classifier)


class TinyBertForTokenClassification(TinyBertForMaskedLM):
    """Scores of tokens: `logits` [batch, seq, num_labels]."""

    head_kind = "TokenClassification"
    _make = staticmethod(make_token_classifier)


def _checked(
    name: str, values: Any, *, below: int, like: np.ndarray | None = None, fix: str = ""
) -> np.ndarray:
    """Whole numbers from 0 to below `below`, [batch, seq] or shaped as `like`."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(
            f"{name}: expected rows of one length, got ragged ones; tokenize with padding=True"
        ) from None
    if like is not None and array.shape != like.shape:
        raise ValueError(
            f"{name}: expected the shape of input_ids {list(like.shape)}, got {list(array.shape)}"
        )
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name}: expected shape [batch, seq], got {list(array.shape)}")
    if not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise ValueError(f"{name}: expected whole numbers, got {array.dtype}")
    if not 0 <= array.min() <= array.max() < below:
        raise ValueError(
            f"{name}: expected numbers from 0 to {below - 1}, got {array.min()} to "
            f"{array.max()}{fix}"
        )
    return array.astype(np.int32)
