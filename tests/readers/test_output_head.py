"""Losses and scores through a reader's output embedding against whole logits of its model."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.output_head import OutputHead
from latentwire_fast.readers.reader import Reader
from latentwire_fast.testbed.tokenizers import build_llama_tokenizer

PADDING = 40  # rows of the head that are no tokens


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return build_llama_tokenizer()


@pytest.fixture(params=["a bias", "padding"])
def reader(request: pytest.FixtureRequest, tokenizer: object) -> Reader:
    """A reader whose head has a bias (F17), or rows beyond the tokenizer's (F21) which are
    likelier than any token."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    rows = len(tokenizer) + (PADDING if request.param == "padding" else 0)
    torch.manual_seed(2)
    if request.param == "padding":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, **shape))
        model.lm_head.weight.data[len(tokenizer) :] *= 5
    else:
        model = PhiForCausalLM(PhiConfig(vocab_size=rows, **shape))
        model.lm_head.bias.data.normal_(std=2.0)
    return Reader(model, tokenizer, name="tiny")


def logits_of(reader: Reader, prompt: Prompt) -> Tensor:
    """Logits of the scored tokens by the model's own forward pass, of tokens alone."""
    logits_TV = reader.model(input_ids=torch.tensor([prompt.ids])).logits[0]
    places = [i - 1 for i, scored in enumerate(prompt.is_target) if scored]
    return logits_TV[places, : len(reader.tokenizer)]


@torch.no_grad()
def test_F17_F21_scores_are_those_of_the_models_logits(reader: Reader) -> None:
    prompt = reader.prompts.build([Turn("Who?", "red lamp")], context="A lamp.")
    logits_NV = logits_of(reader, prompt)
    scores = reader.score([prompt])
    wanted = logits_NV.log_softmax(-1)
    torch.testing.assert_close(scores.gold_N, wanted[range(len(wanted)), scores.labels_N])
    torch.testing.assert_close(scores.logprobs_NV, wanted)
    assert torch.equal(scores.ranked_NK(7), logits_NV.topk(7).indices)


def test_F17_F21_distillation_is_that_of_the_models_logits(reader: Reader) -> None:
    prompts = [
        reader.prompts.build([Turn("Who?", "red lamp")], context=context)
        for context in ("A lamp.", "Nobody knows.")
    ]
    with torch.no_grad():
        teacher, student = (logits_of(reader, prompt).log_softmax(-1) for prompt in prompts)
        hidden = [reader.target_hidden(reader.collate([prompt])) for prompt in prompts]
    labels = reader.collate(prompts[:1]).labels_N
    losses = reader.output_head.losses(hidden[1], labels, teacher_hidden=hidden[0])
    wanted = F.kl_div(student, teacher, reduction="sum", log_target=True)
    torch.testing.assert_close(losses.kd, wanted)
    torch.testing.assert_close(losses.cross_entropy, F.nll_loss(student, labels, reduction="sum"))


@torch.no_grad()
def test_scale_and_softcap() -> None:
    head = OutputHead.of_module(nn.Linear(6, 11), 9, scale=0.5, softcap=2.0)
    hidden, labels = torch.randn(4, 6) * 4, torch.arange(4)
    z = 2 * torch.tanh(0.5 * F.linear(hidden, head.weight, head.bias) / 2)
    torch.testing.assert_close(head.logits(hidden), z[:, :9])
    wanted = F.cross_entropy(z[:, :9], labels, reduction="none")
    found = head.losses(hidden, labels, reduction="none").cross_entropy
    torch.testing.assert_close(found, wanted)


def test_a_head_with_a_lora_counts_with_it() -> None:
    """And its gradient reaches the LoRA, not the weight; switched off, it does not count."""
    module = nn.Sequential(nn.Linear(6, 11))
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(module, config)
    layer = model.base_model.model[0]
    hidden, labels = torch.randn(4, 6), torch.arange(4)
    loss = OutputHead.of_module(layer, 11).losses(hidden, labels).cross_entropy
    wanted = F.cross_entropy(layer(hidden), labels, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == 2
    torch.testing.assert_close(
        torch.autograd.grad(loss, trained), torch.autograd.grad(wanted, trained)
    )
    with model.disable_adapter():
        plain = OutputHead.of_module(layer, 11)
        torch.testing.assert_close(plain.logits(hidden), layer(hidden))
