"""What the small base is made from: plain sentences to read, and a tokenizer. Called by make.sh.

python data/tiny/make.py sentences FILE [passes]       what it reads, of knowledge.jsonl beside this
python data/tiny/make.py tokenizer FILE [vocab_size]   its SentencePiece model, of the same
"""

import random
import sys
from io import BytesIO
from pathlib import Path

from sentencepiece import SentencePieceTrainer

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from build_data import facts, read_knowledge, write_lines  # noqa: E402
from generate import DATA, load_template  # noqa: E402
from model import read_json_file  # noqa: E402


def write_sentences(entities, forms, passes, rng):
    """Plain documents: for every entity and pass, all its facts in a random order and phrasing,
    broken at random into documents of one to six statements.

    Every statement names the entity, so that each fact is stored under the name and can be asked
    for alone (Allen-Zhu & Li 2023, Physics of Language Models 3.1: augmentation)."""
    documents = []
    for _ in range(passes):
        for entity in entities:
            statements = [
                rng.choice(fact.form["statements"]).format(e=fact.entity, v=fact.text)
                for fact in facts(entity, forms)
            ]
            rng.shuffle(statements)
            while statements:
                n = rng.randint(1, 6)
                text = "".join(statements[:n])
                documents.append({"instruction": "", "input": "", "output": text})
                statements = statements[n:]
    rng.shuffle(documents)
    return documents


def tokenizer_texts(entities, forms):
    """Names, values and the parts of forms, each for itself, so that no piece of the tokenizer
    crosses the border of a term; then the lines of the prompt templates."""
    texts = []
    for entity in entities:
        for fact in facts(entity, forms):
            texts += [fact.entity, *fact.values]
            for text in fact.form["questions"] + fact.form["statements"]:
                texts += [part for part in text.replace("{v}", "{e}").split("{e}") if part]
    for path in sorted((DATA / "templates").glob("*.json")):
        # Those of chats are made of other bases' tokens.
        prompt = load_template(path).get("prompt_no_input", "").replace("{instruction}", "")
        texts += [line for line in prompt.split("\n") if line.strip()]
    return texts


def train_tokenizer(texts, vocab_size):
    """The bytes of a SentencePiece BPE with byte fallback and LLaMA's special ids (0 unknown, 1
    BOS, 2 EOS). Raises ValueError if the texts do not give so many pieces."""
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
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece cannot make {vocab_size} pieces of this text: {error}"
        ) from None
    return model.getvalue()


if __name__ == "__main__":
    what, path, *number = sys.argv[1:]
    entities = read_knowledge(Path(__file__).with_name("knowledge.jsonl"))
    forms = read_json_file(DATA / "forms.json")
    if what == "sentences":
        passes = int(*number or [30])
        write_lines(path, write_sentences(entities, forms, passes, random.Random(0)))
    else:
        pieces = int(*number or [4096])
        Path(path).write_bytes(train_tokenizer(tokenizer_texts(entities, forms), pieces))
