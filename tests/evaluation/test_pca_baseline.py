"""Principal components of embeddings as a baseline: what they keep, and where they are measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentwire_fast.config.schema import EvalConfig, Mode
from latentwire_fast.data.examples import Example
from latentwire_fast.data.sources import training_texts
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.evaluation.evaluator import Evaluator
from latentwire_fast.evaluation.methods.base import EvaluationCase, unanswered
from latentwire_fast.evaluation.methods.pca import PCA, fit
from latentwire_fast.evaluation.report import write_report
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import replaced_text
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import METHODS
from latentwire_fast.serving import Receiver
from readers import tiny_interlingua
from runs import tiny_config, tiny_squad

TEXTS = tuple(f"Person {i} is {20 + i} years old and lives in town {i * i}." for i in range(12))


def case_of(
    model: Interlingua, reader: Reader, examples: list[Example], texts: tuple[str, ...] = TEXTS
) -> EvaluationCase:
    """A case whose payloads are of 16 bits."""
    questions = [e.question for e in examples] if model.mode == "pure" else None
    payloads = model.encode_payloads([e.context for e in examples], questions, bits=16)
    return EvaluationCase(model, reader, examples, {16: payloads}, texts)


@pytest.mark.parametrize("mode", ["context", "pure"])
def test_soft_tokens_are_what_the_components_keep_of_spans(
    mode: Mode, readers: dict[str, Reader], reader: Reader, examples: list[Example]
) -> None:
    case = case_of(tiny_interlingua(readers, mode), reader, examples[:3])
    method = METHODS["pca"](METHODS.config("pca"))
    inputs = method.build(case, range(3), bits=16)
    assert inputs.positions == [4, 4, 4]
    axes = fit(reader, TEXTS, 8)
    onto = axes.axes_kD.T @ axes.axes_kD
    assert inputs.embeddings is not None
    for example, soft in zip(examples[:3], inputs.embeddings, strict=True):
        text = replaced_text(example.context, example.question, mode=mode)
        embeds = reader.embedding(torch.tensor(reader.prompts.text_ids(text)))
        means = torch.stack(
            [
                span.mean(0)
                for span in embeds.tensor_split([len(embeds) * m // 4 for m in (1, 2, 3)])
            ]
        )
        wanted = (means - axes.mean_D) @ onto + axes.mean_D
        torch.testing.assert_close(soft, wanted, rtol=0, atol=5e-3)
    share = method.facts(case)["explained_variance"]
    ids = [i for text in TEXTS for i in reader.prompts.text_ids(text)]
    rows = reader.embedding(torch.tensor(ids))
    kept = ((rows - rows.mean(0)) @ onto).square().sum() / (rows - rows.mean(0)).square().sum()
    assert share == pytest.approx(float(kept), abs=1e-4)
    prompts = [unanswered(prompt) for prompt in inputs.prompts]
    assert Receiver.of(case.model, reader).generate(prompts, embeddings=inputs.embeddings)


def test_it_is_measured_where_there_are_texts_to_fit_to(
    readers: dict[str, Reader], examples: list[Example], llama_folder: Path, tmp_path: Path
) -> None:
    readers = {"llama": readers["llama"]}
    model = tiny_interlingua(readers, "context")
    fast = {"max_new_tokens": 2, "timing_examples": 1, "bits": (6,), "resamples": 20}
    config = tiny_config(llama_folder, evaluation=fast)
    results = Evaluator(
        config, model, readers, examples[:4], training_texts=TEXTS, progress=False
    ).run()
    metrics = results.metrics()
    for entry in metrics["readers"].values():
        assert 0 < entry["pca"]["explained_variance"] < 1
        assert entry["pca"]["prefix_positions_mean"] == 4
        assert entry["pca"]["nll_per_token"]["mean"] > 0
    write_report(
        tmp_path, metrics=metrics, predictions=results.records(), diagnostics=[], config={}
    )
    assert "% of the variance" in (tmp_path / "report.html").read_text()
    assert "explained_variance" in (tmp_path / "metrics.csv").read_text()
    assert "| PCA |" in (tmp_path / "report.md").read_text()


def test_texts_are_those_that_a_run_learns_from(llama_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(llama_folder)
    texts = training_texts(config, 5)
    assert len(set(texts)) == len(texts) == 5
    assert training_texts(config, 0) == []
    data = tiny_squad(tmp_path / "data.json")
    config = tiny_config(llama_folder, data={"source": str(data)})
    few = training_texts(config, 2)
    assert len(few) == 2
    assert set(few) < set(training_texts(config, 1000))


def test_it_checks_itself(readers: dict[str, Reader], examples: list[Example]) -> None:
    with pytest.raises(ConfigError, match="pca_texts=-1, expected at least 0"):
        EvalConfig(pca_texts=-1)
    case = case_of(tiny_interlingua(readers, "context"), readers["llama"], examples[:1], ("a",))
    with pytest.raises(DataError, match="too few for 8 principal axes"):
        PCA(PCA.Config()).build(case, range(1), bits=16)
    assert not PCA(PCA.Config()).fits(case_of(case.model, case.reader, examples[:1], ()))
