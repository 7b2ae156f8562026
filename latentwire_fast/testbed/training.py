"""The training of a testbed reader from initial weights."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from latentwire_fast.config.schema import OptimConfig
from latentwire_fast.config.serialization import to_json
from latentwire_fast.errors import CheckpointError
from latentwire_fast.testbed.induction import add_induction_circuit
from latentwire_fast.testbed.recipes import Recipe
from latentwire_fast.testbed.rows import DRILLS, RowMaker, collate, drill_rows
from latentwire_fast.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from latentwire_fast.training.optimizer_state import (
    load_optimizer_state,
    optimizer_state,
    restore_rng_state,
    rng_state,
)
from latentwire_fast.training.optimizers import build_optimizers, scale_learning_rates


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A freshly initialised reader with tied embeddings."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "intermediate_size": 2 * recipe.hidden_size,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads or recipe.heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(recipe.architecture, **shape))
    add_induction_circuit(model)
    return model


class ReaderTraining:
    """Trains one reader; interrupted, it goes on from its last checkpoint.

    Args:
        checkpoints: folder for checkpoints every `SAVE_EVERY` steps; None keeps none.
    """

    SAVE_EVERY = 250

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        *,
        checkpoints: Path | None = None,
    ) -> None:
        self.recipe = recipe
        self.pad_id = tokenizer.pad_token_id
        self.model = new_model(recipe, tokenizer).train()
        self.rng = random.Random(1234 + recipe.seed)
        self.rows = RowMaker(tokenizer, self.rng)
        self.named = list(self.model.named_parameters())
        settings = OptimConfig(muon_lr=recipe.muon_lr, adamw_lr=recipe.adamw_lr, weight_decay=0.01)
        self.optimizers = build_optimizers(self.model, settings)
        self.accuracy = {"copy": 0.0, "answer": 0.0}
        self.step = 0
        self.checkpoints = checkpoints
        latest = None if checkpoints is None else latest_checkpoint(checkpoints)
        if latest is not None:
            self._restore(load_checkpoint(latest))

    def _restore(self, saved: Checkpoint) -> None:
        if saved.state["recipe"] != to_json(self.recipe):
            raise CheckpointError(
                f"{saved.path} was made with another recipe; give the same options, or remove it"
            )
        with torch.no_grad():  # parameter by parameter: a tied head is stored once
            for name, parameter in self.named:
                parameter.copy_(saved.tensors["model"][name])
        load_optimizer_state(
            self.optimizers,
            self.named,
            tensors=saved.tensors["optimizer"],
            state=saved.state["optimizer"],
        )
        generators = {"rows": self.rng}
        restore_rng_state(generators, tensors=saved.tensors["rng"], state=saved.state["rng"])
        self.accuracy, self.step = saved.state["accuracy"], saved.step

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        if self.checkpoints is None:
            return
        optimizer_tensors, optimizer = optimizer_state(self.optimizers, self.named)
        rng_tensors, rng = rng_state({"rows": self.rng})
        save_checkpoint(
            self.checkpoints,
            step=self.step,
            tensors={"model": dict(self.named), "optimizer": optimizer_tensors, "rng": rng_tensors},
            state={
                "recipe": to_json(self.recipe),
                "optimizer": optimizer,
                "rng": rng,
                "accuracy": self.accuracy,
            },
            keep=1,
        )

    def run(self, *, progress: bool = True) -> PreTrainedModel:
        """Train to the last step."""
        bar = tqdm(
            total=self.recipe.steps,
            initial=self.step,
            disable=not progress,
            desc=f"build {self.recipe.architecture}",
            unit="step",
        )
        with bar:
            while self.step < self.recipe.steps:
                loss = self._train_step()
                self.step += 1
                bar.update()
                if self.step % 10 == 0:
                    parts = (f"{name} {value:.3f}" for name, value in self.accuracy.items())
                    bar.set_postfix_str(f"loss {loss:.3f} {' '.join(parts)}")
                if self.step % self.SAVE_EVERY == 0:
                    self.save()
        return self.model.eval()

    def _train_step(self) -> float:
        facts = self.recipe.facts_at(self.step)
        final = self.step >= self.recipe.final_from
        rows = self.rows.batch(facts, self.recipe.batch_size, unasked=final)
        ids, weights = collate(rows, self.pad_id)
        scale_learning_rates(self.optimizers, self.recipe.lr_factor(self.step))
        logits = self.model(input_ids=ids).logits[:, :-1].float()
        labels, weights = ids[:, 1:], weights[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (losses.view_as(weights) * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        correct, scored = logits.detach().argmax(-1) == labels, weights == 1.0
        drills = DRILLS * drill_rows(len(ids)) if facts else len(ids)
        for key, part in (("copy", slice(0, drills)), ("answer", slice(drills, None))):
            if scored[part].any():
                value = correct[part][scored[part]].float().mean().item()
                self.accuracy[key] += 0.05 * (value - self.accuracy[key])
        return loss.item()
