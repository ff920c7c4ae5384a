"""What the small base is made from: plain sentences to read, and a tokenizer. Called by make.sh.

  python data/tiny/make.py sentences FILE [passes]      plain sentences, what a base is trained on
  python data/tiny/make.py tokenizer FILE [vocab_size]  a SentencePiece model

Both are made from data/knowledge.jsonl.
"""

import random
import sys
from io import BytesIO
from pathlib import Path

from sentencepiece import SentencePieceTrainer

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from build_data import facts, read_knowledge, write_lines  # noqa: E402
from generate import DATA, TEMPLATES, load_template  # noqa: E402
from model import read_json_file  # noqa: E402


def write_sentences(entities, forms, passes, rng):
    """Plain documents: for every entity and pass, all its facts in a random order and phrasing,
    broken at random into documents of one to six statements. Every statement names the entity, so
    that each fact is stored under the name and can be asked for alone (Allen-Zhu & Li 2023, Physics
    of Language Models 3.1: augmentation)."""
    documents = []
    for _ in range(passes):
        for entity in entities:
            own = facts(entity, forms)
            statements = [
                rng.choice(fact.form["statements"]).format(e=fact.entity, v=fact.text)
                for fact in own
            ]
            rng.shuffle(statements)
            while statements:
                n = rng.randint(1, 6)
                documents.append(
                    {"instruction": "", "input": "", "output": "".join(statements[:n])}
                )
                statements = statements[n:]
    rng.shuffle(documents)
    return documents


def train_tokenizer(entities, forms, vocab_size):
    """The bytes of a SentencePiece BPE with byte fallback and LLaMA's special ids (0 unknown, 1
    BOS, 2 EOS), trained on the names, values and forms each for itself, so that no piece crosses
    the border of a term."""
    texts = []
    for entity in entities:
        for fact in facts(entity, forms):
            texts += [fact.entity, *fact.values]
            for text in fact.form["questions"] + fact.form["statements"]:
                texts += [part for part in text.replace("{v}", "{e}").split("{e}") if part]
    for path in sorted(TEMPLATES.glob("*.json")):
        template = load_template(path)
        texts += [
            line
            for line in template["prompt_no_input"].replace("{instruction}", "").split("\n")
            if line.strip()
        ]
    model = BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            split_digits=True,
            add_dummy_prefix=False,
            minloglevel=2,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece cannot make {vocab_size} pieces of this text: {error}"
        ) from None
    return model.getvalue()


if __name__ == "__main__":
    what, path, *number = sys.argv[1:]
    entities, forms = read_knowledge(DATA / "knowledge.jsonl"), read_json_file(DATA / "forms.json")
    if what == "sentences":
        write_lines(path, write_sentences(entities, forms, int(*number or [30]), random.Random(0)))
    else:
        Path(path).write_bytes(train_tokenizer(entities, forms, int(*number or [4096])))
