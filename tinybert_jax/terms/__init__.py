"""The terms of distillation: one file a term with its settings, loss, costs and what must fit."""
