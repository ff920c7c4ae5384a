"""lm-eval (pip install lm_eval) asks the server: multiple choice by likelihood through its client
`local-completions`, with tokenised prompts and 8 at once, must come out as tests/evaluate.py has it
without a server."""

import generate as G

import evaluate as E
import pytest
import torch
from conftest import ROOT
from exams import read_exams
from scripted import serving

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval")
pytestmark = pytest.mark.slow

from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402


def texts(question):
    options = question["options"]
    return [options[letter] for letter in sorted(options) if options[letter]]


def right(question):
    return sorted(question["options"]).index(question["answer"])


def test_choices_by_likelihood_are_the_same(tmp_path):
    path = ROOT / "data" / "choice.jsonl"
    model, tokenizer = G.load_base(ROOT / "data" / "tiny", "cpu", torch.float32)
    template = G.load_template(G.default_template(tokenizer))
    candidate = E.Candidate("base", ROOT / "data" / "tiny", "", template, model, tokenizer)
    questions = read_exams([str(path)])
    found = [E.choose(candidate, question) == question["answer"] for question in questions]

    class Ours(LocalCompletionsAPI):
        """Its client, with the ids of this project's prompts and answers."""

        def _encode_pair(self, context, continuation):
            return candidate.prompt(context), tokenizer.encode_answer(continuation)

    batch = G.Batch(model, 8, 512, G.eos_ids(tokenizer), tokenizer.decode)
    options = G.Options(port=0)
    server = G.Server(batch, tokenizer, ["base"], candidate.prompt, options)
    with serving(server) as address:
        client = Ours(
            base_url=f"{address}v1/completions",
            model="base",
            tokenizer_backend=None,
            batch_size=8,
            max_length=511,
        )
        client.tokenizer, client.tokenized_requests = tokenizer, True
        task = ConfigurableTask(
            config={
                "task": "choice",
                "dataset_path": "json",
                "dataset_kwargs": {
                    "data_files": {"test": str(path)},
                    "cache_dir": str(tmp_path),
                },
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": lambda question: question["question"],
                "doc_to_choice": texts,
                "doc_to_target": right,
                "target_delimiter": "",
                "metric_list": [
                    {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
                ],
            }
        )
        got = lm_eval.simple_evaluate(client, tasks=[task], bootstrap_iters=0)
    theirs, ours = got["results"]["choice"]["acc_norm,none"], sum(found) / len(found)
    print(f"\naccuracy by lm-eval {theirs}, by evaluate.py {ours}")
    assert theirs == pytest.approx(ours)
    assert 0 < sum(found) < len(found) == 200
