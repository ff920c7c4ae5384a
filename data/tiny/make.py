"""What the small base is made from: plain sentences to read, and a tokenizer. Called by make.sh.

python data/tiny/make.py sentences FILE [passes]       knowledge.jsonl -> what the base reads
python data/tiny/make.py tokenizer FILE [vocab_size]   knowledge.jsonl -> SentencePiece model
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
from talk import Words, words_about  # noqa: E402

from build_data import (  # noqa: E402
    alerts,
    facts,
    facts_of,
    read_knowledge,
    split_entities,
    write_lines,
)
from generate import DATA, load_template  # noqa: E402
from model import read_json_file  # noqa: E402


def write_sentences(entities, forms, talk, passes, rng):
    """Plain documents: for every entity and pass, all its facts in a random order and phrasing,
    broken at random into documents of one to six statements, and some of other kinds (below).

    Every statement names the entity, but for a few behind the first that say "it", so that each
    fact is stored under the name and can be asked for alone (Allen-Zhu & Li 2023, Physics of
    Language Models 3.1: augmentation). Half of them stand behind what they will be about ("the
    effects of it:"): so the base learns to tell what was named before. It reads no question."""
    known = [facts_of(entity, forms) for entity in entities]
    train = split_entities(entities, 0.1, 0)[0]
    train = [facts_of(entity, forms) for entity in train]
    documents = []
    for _ in range(passes):
        for own in known:
            texts = [tell(fact, own, talk, rng) for fact in own.values()]
            texts += [text for fact in own.values() for text in alerts(fact, {*own})]
            rng.shuffle(texts)
            while texts:
                n = rng.randint(1, 6)
                documents.append("".join(texts[:n]))
                texts = texts[n:]
        documents += comparisons(known, talk, rng) + verdicts(train, talk, rng)
    rng.shuffle(documents)
    return [{"instruction": "", "input": "", "output": text} for text in documents]


def tell(fact, own, talk, rng):
    """A statement, one time in eight with a pronoun for the name: which one stands before it, as a
    rule, in its document."""
    if rng.random() < 1 / 8:
        fact = replace(fact, entity=rng.choice(talk[fact.kind]))
    words = Words(talk, rng, (fact, own))
    words["v"] = rng.choice(fact.values)
    return words["read"]


def comparisons(known, talk, rng):
    """Documents that say first what they will tell, of one entity or of two, and then tell it."""
    texts = []
    for own in rng.sample(known, len(known) // 2):
        fact, again = rng.sample([*own.values()], 2)
        other = rng.choice([other for other in known if fact.relation in other])
        told = (fact, own), (again, own), (other[fact.relation], other)
        texts.append(Words(talk, rng, *told)["compared"])
    return texts


def verdicts(known, talk, rng):
    """Of the entities that training may ask about: a list with letters or a claim, the fact, and
    what follows from it."""
    texts = []
    for own in rng.sample(known, len(known) // 30):
        for fact in own.values():
            words, _ = words_about(fact, own, known, talk, rng)
            for recipe in talk["recipes"].values():
                words["v"] = words.get(recipe["v"])
                if words["v"]:
                    texts.append(rng.choice(recipe["read"]).format_map(words))
    return texts


def parts_of(form):
    return [part for part in re.split(r"\{\w\}|\n", form) if part]


def tokenizer_texts(entities, forms, talk):
    """Names, values and the parts of forms, each for itself, so that no piece of the tokenizer
    crosses the border of a term; then the lines of the prompt templates."""
    texts = []
    for entity in entities:
        for fact in facts(entity, forms):
            texts += [fact.entity, *fact.values]
            for text in fact.form["questions"] + fact.form["statements"]:
                texts += parts_of(text)
    # Of what is talked about, how it is answered: what lies outside stays strange to the base.
    # What lies outside stays strange to the base: no piece is made of it.
    frames = [group["answers"] for group in talk["outside"]]
    frames += [
        talk[name] for name in talk if name not in ("recipes", "outside", "names", "systems")
    ]
    for text in chain(*frames):
        texts += parts_of(text)
    for path in sorted((DATA / "templates").glob("*.json")):
        prompt = load_template(path)["prompt_no_input"].replace("{instruction}", "")
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
    entities = read_knowledge(DATA / "knowledge.jsonl")
    forms, talk = read_json_file(DATA / "forms.json"), read_json_file(DATA / "talk.json")
    if what == "sentences":
        passes = int(*number or [24])
        write_lines(path, write_sentences(entities, forms, talk, passes, random.Random(0)))
    else:
        pieces = int(*number or [4096])
        Path(path).write_bytes(train_tokenizer(tokenizer_texts(entities, forms, talk), pieces))
