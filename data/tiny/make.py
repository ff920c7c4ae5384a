"""What the small base is made from: what it reads, and a tokenizer. Called by make.sh.

python data/tiny/make.py documents FILE PASSES EXERCISES   knowledge.jsonl, told and asked about
python data/tiny/make.py tokenizer FILE VOCAB_SIZE         a SentencePiece model of the same
"""

import random
import re
import sys
from dataclasses import replace
from io import BytesIO
from itertools import chain
from pathlib import Path

from sentencepiece import SentencePieceTrainer

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from talk import pairs, talks  # noqa: E402
from talk import records as talk_records  # noqa: E402

from build_data import (  # noqa: E402
    alerts,
    facts_of,
    kinds_of,
    offline_record,
    read_knowledge,
    single_questions,
    split_entities,
    write_lines,
)
from generate import DATA, load_template, read_messages  # noqa: E402
from model import read_json_file  # noqa: E402

SPEAKERS = {"system": "", "user": "问：", "assistant": "答："}


def documents(entities, forms, talk, passes, exercises, rng):
    """What the base reads, in one random order: textbook passages on every entity; exercises on
    two thirds of those that training may ask about.

    Facts are told in many phrasings and orders, so that each is stored under its entity's name
    and can be asked for alone; that questions about some entities make the facts of others
    answerable is mixed training (Allen-Zhu & Li 2023, Physics of Language Models 3.1). With the
    last third tuning teaches that a name is known which no exercise had."""
    texts = [text for _ in range(passes) for text in passages(entities, forms, talk, rng)]
    train, held_out = split_entities(entities, 0.1, 0)
    hidden = [*kinds_of(held_out)]
    asked = split_entities(train, 0.33, 1)[0]
    for seed in range(1, exercises + 1):
        single = single_questions(asked, forms, 2, random.Random(seed))
        texts += [spoken(offline_record(*one)) for one in single]
        texts += map(spoken, talk_records(asked, hidden, forms, talk, seed, (talks, pairs)))
    rng.shuffle(texts)
    return [{"instruction": "", "input": "", "output": text} for text in texts]


def passages(entities, forms, talk, rng):
    """All facts of every entity in a random order and phrasing, broken at random into documents of
    one to six statements; one statement in eight has a pronoun for the name."""
    for own in (facts_of(entity, forms) for entity in entities):
        texts = [text for fact in own.values() for text in alerts(fact, {*own})] * 2
        for fact in own.values():
            if rng.random() < 1 / 8:
                fact = replace(fact, entity=rng.choice(talk[fact.kind]))
            texts.append(fact.statement(rng))
        rng.shuffle(texts)
        while texts:
            n = rng.randint(1, 6)
            yield "".join(texts[:n])
            texts = texts[n:]


def spoken(record):
    """A record as an exercise book prints it."""
    return "\n".join(SPEAKERS[m["role"]] + m["content"] for m in read_messages(record))


def parts_of(form):
    return [part for part in re.split(r"\{\w\}|\n", form) if part]


def tokenizer_texts(entities, forms, talk):
    """Names, values and the parts of forms, each for itself, so that no piece of the tokenizer
    crosses the border of a term; then the lines of the prompt templates."""
    texts = []
    for entity in entities:
        for fact in facts_of(entity, forms).values():
            texts += [fact.entity, *fact.values]
            for text in fact.form["questions"] + fact.form["statements"]:
                texts += parts_of(text)
    # How it is talked, and how what lies outside is answered; no piece is made of its questions.
    frames = [group["answers"] for group in talk["outside"]]
    frames += [
        talk[name] for name in talk if name not in ("recipes", "outside", "names", "systems")
    ]
    for text in chain(*frames):
        texts += parts_of(text)
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
    what, path, *more = sys.argv[1:]
    entities = read_knowledge(DATA / "knowledge.jsonl")
    forms, talk = read_json_file(DATA / "forms.json"), read_json_file(DATA / "talk.json")
    if what == "documents":
        passes, exercises = map(int, more)
        write_lines(path, documents(entities, forms, talk, passes, exercises, random.Random(0)))
    else:
        pieces = int(*more)
        Path(path).write_bytes(train_tokenizer(tokenizer_texts(entities, forms, talk), pieces))
