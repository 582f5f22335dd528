"""The public Python face: Hugging Face-like classes over the pure functions.

Inputs: PyTorch, NumPy or JAX arrays, or nested lists. Outputs: JAX arrays, by key or attribute.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.convert import hf_files
from tinybert_jax.model.heads import make_classifier, make_encoder, make_masked_lm
from tinybert_jax.sections import ModelConfig


class ModelOutput(dict):
    """`outputs["logits"]` and `outputs.logits`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output '{name}'; there are {list(self)}") from None


class TinyBertModel:
    """The bare encoder: `last_hidden_state`, `pooler_output`, and what distillation reads."""

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, Any],
        label_names: tuple[str, ...] | None = None,
        tokenizer: Any = None,
    ):
        self.config, self.params = config, params
        self.label_names, self.tokenizer = label_names, tokenizer
        apply, _ = self._functions(config, len(label_names or ()) or 1)
        self._forward = jax.jit(lambda params, *inputs: self._outputs(apply(params, *inputs)))

    @classmethod
    def from_pretrained(cls, path: str | Path, *, label_names: tuple[str, ...] | None = None):
        """Reads a Hugging Face folder or hub id.

        A folder without this class's head gets a fresh one, and says so; `label_names` sizes it.
        Raises ValueError where the folder is not a readable BERT.
        """
        source = hf_files.read_model(path)
        names = label_names or source.label_names
        num_outputs = len(names or ()) or 1
        if names is None and "classifier.weight" in source.tensors:
            num_outputs = source.tensors["classifier.weight"].shape[0]
            names = tuple(f"LABEL_{i}" for i in range(num_outputs))
        _, init = cls._functions(source.config, num_outputs)
        params = hf_files.start_params(path, init)
        try:
            tokenizer = hf_files.load_tokenizer(path)
        except ValueError:
            tokenizer = None  # only save_pretrained needs it, and says so
        return cls(source.config, params, names, tokenizer)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        **unused: Any,
    ) -> ModelOutput:
        """A deterministic forward pass of ids [batch, seq]; a mask of ones where none is given."""
        if unused:
            raise ValueError(
                f"expected input_ids, attention_mask and token_type_ids, got also {sorted(unused)}"
            )
        ids = self._checked_ids(input_ids)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        types = np.zeros_like(ids) if token_type_ids is None else np.asarray(token_type_ids)
        for name, array in (("attention_mask", mask), ("token_type_ids", types)):
            if array.shape != ids.shape:
                raise ValueError(
                    f"{name}: expected the shape of input_ids {list(ids.shape)}, "
                    f"got {list(array.shape)}"
                )
        outputs = self._forward(self.params, ids, mask.astype(bool), types.astype(np.int32))
        return ModelOutput(outputs)

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """Writes a folder that `AutoModel….from_pretrained` loads; reads it back and compares."""
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise ValueError("save_pretrained: expected a tokenizer; pass tokenizer=…")
        return hf_files.save_model(
            folder, self.params, self.config, tokenizer, label_names=self.label_names
        )

    def _checked_ids(self, input_ids: Any) -> np.ndarray:
        ids = np.asarray(input_ids)
        if ids.ndim != 2:
            raise ValueError(f"input_ids: expected shape [batch, seq], got {list(ids.shape)}")
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids: expected at most {self.config.max_position_embeddings} positions, "
                f"got {ids.shape[1]}; tokenize with truncation=True"
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            raise ValueError(
                f"input_ids: expected ids from 0 to {self.config.vocab_size - 1}, got "
                f"{ids.min()} to {ids.max()}; use the tokenizer that belongs to the model"
            )
        return ids.astype(np.int32)

    @staticmethod
    def _functions(config: ModelConfig, num_outputs: int):
        return make_encoder(config)

    @staticmethod
    def _outputs(encoded) -> dict[str, jax.Array]:
        return {
            "last_hidden_state": encoded.hidden[-1],
            "pooler_output": encoded.pooled,
            "hidden_states": encoded.hidden,
            "queries": encoded.queries,
            "keys": encoded.keys,
            "values": encoded.values,
        }


class TinyBertForSequenceClassification(TinyBertModel):
    """Classification or regression: `logits` [batch, num_labels]."""

    @staticmethod
    def _functions(config: ModelConfig, num_outputs: int):
        return make_classifier(config, num_outputs)

    @staticmethod
    def _outputs(output) -> dict[str, jax.Array]:
        return {"logits": output.logits}


class TinyBertForMaskedLM(TinyBertModel):
    """`logits` [batch, seq, vocab]."""

    @staticmethod
    def _functions(config: ModelConfig, num_outputs: int):
        return make_masked_lm(config)

    @staticmethod
    def _outputs(logits) -> dict[str, jax.Array]:
        return {"logits": logits.astype(jnp.float32)}
