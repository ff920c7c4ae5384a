"""What the small base is made from: what it reads, and a tokenizer. Called by make.sh.

python data/tiny/make.py documents FILE PASSES EXERCISES SEED   knowledge.jsonl, told and asked
python data/tiny/make.py tokenizer FOLDER VOCAB_SIZE       a SentencePiece model of the same, and
                                     what other programs must know of it
python data/tiny/make.py copying FRESH BASE    a fresh model with two heads that copy
"""

import random
import re
import sys
from dataclasses import replace
from io import BytesIO
from itertools import chain
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from build_data import (  # noqa: E402
    answer,
    facts_of,
    kinds_of,
    offline_record,
    read_knowledge,
    single_questions,
    split_entities,
    values_in,
    write_lines,
)
from generate import DATA, load_template, read_messages  # noqa: E402
from model import load_model, read_json_file, save_model, tell_transformers, write_json  # noqa: E402

from talk import Words, comprehension, pairs, talks  # noqa: E402
from talk import records as talk_records  # noqa: E402

# Who asks and who answers, as exercise books print it; the first in every second.
SPEAKERS = [("问：", "答：")] * 5
SPEAKERS += [
    ("问题：", "回答："),
    ("学生：", "老师："),
    ("患者：", "医生："),
    ("甲：", "乙："),
    ("", ""),
]


def documents(entities, forms, talk, passes, exercises, rng):
    """What the base reads, in one random order: textbook passages on every entity; exercises on
    two thirds of those that training may ask about; some that ask for reading alone; and drills in
    copying.

    Facts are told in many phrasings and orders, so that each is stored under its entity's name
    and can be asked for alone; that questions about some entities make the facts of others
    answerable is mixed training (Allen-Zhu & Li 2023, Physics of Language Models 3.1). With the
    last third tuning teaches that a name is known which no exercise had."""
    texts = [text for _ in range(passes) for text in passages(entities, forms, talk, rng)]
    train, held_out = split_entities(entities, 0.1, 0)
    hidden = [*kinds_of(held_out)]
    asked = split_entities(train, 0.33, 1)[0]
    for seed in range(1, exercises + 1):
        # Questions for two facts at once are the harder ones: all of those, a third of the others.
        single = [*single_questions(asked, forms, 6, random.Random(seed))]
        single = [one for i, one in enumerate(single) if i % 3 == 0 or len(one[2]) > 1]
        records = [offline_record(*one) for one in single]
        records += talk_records(asked, hidden, forms, talk, seed, (talks, pairs))
        records += talk_records(train, hidden, forms, talk, seed, (comprehension,))
        texts += [spoken(record, rng) for record in records]
    texts += repeats(entities, 500 * exercises, rng)
    texts += comparisons(entities, forms, 4_000 * exercises, rng)
    rng.shuffle(texts)
    return [{"instruction": "", "input": "", "output": text} for text in texts]


def repeats(entities, number, rng):
    """Words that mean nothing, told twice: only copying foresees the second time."""
    letters = sorted({c for entity in entities for text in entity.values() for c in "".join(text)})
    for _ in range(number):
        words = ["".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(8)]
        said = words[: rng.randint(1, 8)]
        again = rng.choice((said, said, rng.sample(said, len(said))))
        yield "、".join(said) + "。\n" + "、".join(again) + "。"


def comparisons(entities, forms, number, rng):
    """Values of any facts, in every second of facts of one relation, which are the more alike, and
    which of some others are among them."""
    known = [facts_of(entity, forms) for entity in entities]
    facts = [*chain(*(own.values() for own in known))]
    relations = sorted({fact.relation for fact in facts})
    pools = [{*values_in(f for f in facts if f.relation == name)} for name in relations]
    pools = [sorted(pool) for pool in pools if len(pool) > 9]
    everything = sorted({*values_in(facts)})
    for _ in range(number):
        values = rng.choice([everything, rng.choice(pools)])
        told = rng.sample(values, rng.randint(1, 6))
        asked = rng.sample(told, rng.randint(0, min(3, len(told)))) + rng.sample(values, 3)
        rng.shuffle(asked)
        text = "、".join(told)
        looked = (f"{value}{'相符' if value in text else '不符'}" for value in asked)
        yield f"{text}。\n{'，'.join(looked)}。"


def passages(entities, forms, talk, rng):
    """All facts of every entity in a random order and phrasing, each with what an answer says
    besides, broken at random into documents of one to six; one in eight has a pronoun for the
    name. Doses and compositions stand there four times, each with its cautions: a wrong one does
    harm."""
    for own in (facts_of(entity, forms) for entity in entities):
        texts, grave = [], [own[name] for name in ("用法用量", "组成") if name in own]
        for fact in [*own.values(), *grave * 3]:
            if rng.random() < 1 / 8:
                fact = replace(fact, entity=rng.choice(talk[fact.kind]))
            texts.append(answer([fact], own, rng))
            if rng.random() < 1 / 2:
                # One value alone, as somebody remembers it: each is known for itself.
                words = Words(talk, rng, (fact, own))
                words["v"] = rng.choice(fact.values)
                texts.append(words["claim"])
        rng.shuffle(texts)
        while texts:
            n = rng.randint(1, 6)
            yield "".join(texts[:n])
            texts = texts[n:]


def spoken(record, rng):
    """A record as an exercise book prints it."""
    user, assistant = rng.choice(SPEAKERS)
    marks = {"system": "", "user": user, "assistant": assistant}
    return "\n".join(marks[m["role"]] + m["content"] for m in read_messages(record))


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


@torch.no_grad()
def put_in_copying(model, rng):
    """Set two heads of a fresh model so that it copies: where a token stands a second time it
    foresees what followed the first time (Elhage et al. 2021, A Mathematical Framework for
    Transformer Circuits; Olsson et al. 2022, In-context Learning and Induction Heads). A model of
    this size finds such heads by itself only in many times the text that it reads here, and without
    them it can neither take up a name that it does not know nor look up an option.

    Dimension 0 of the residual stream is a constant; in the others a token is a random direction t.
    Head 0 of layer 0 looks one position back and adds Q1 t of the token there. Head 0 of layer 1
    looks for the position whose Q1 t is that of its own token, and adds Q2 t of the token there,
    which is the direction that the output layer reads."""
    D, size = model.config.hidden_size, model.config.head_dim
    half = size // 2

    def rotation():
        """A random rotation (D, D) that leaves dimension 0 alone."""
        matrix = torch.eye(D)
        matrix[1:, 1:] = torch.linalg.qr(torch.randn(D - 1, D - 1, generator=rng))[0]
        return matrix

    Q1, Q2 = rotation(), rotation()
    sees, tells = rotation()[1 : 1 + size], rotation()[1 : 1 + size]  # (size, D): what a head reads
    # Tokens, their constant, and the output layer. Large weights change slowly, relative to them,
    # in Adam's steps of one size: so the heads outlive the first ones.
    tokens = torch.randn(model.embed_tokens.weight.shape, generator=rng) / 2
    tokens[:, 0] = 0
    model.lm_head.weight.copy_(0.8 * tokens @ Q2.T)
    model.norm.weight.fill_(0.2)
    tokens[:, 0] = 4
    model.embed_tokens.weight.copy_(tokens)
    # One back: query and key are constants, and the key is turned as if it stood one further on.
    # In the six fastest pairs of RoPE other distances fall off.
    angles = model.config.rope_theta ** (-torch.arange(half) / half)
    first = model.layers[0].self_attn
    query, key = first.q_proj.weight, first.k_proj.weight
    query[:size], key[:size] = 0, 0
    for pair in range(6):
        query[pair, 0] = 0.9
        key[pair, 0] = 0.9 * angles[pair].cos()
        key[half + pair, 0] = 0.9 * angles[pair].sin()
    first.v_proj.weight[:size] = sees
    first.o_proj.weight[:, :size] = 1.1 * Q1 @ sees.T
    # The same token: in the slowest pairs, which tell near from far least.
    second = model.layers[1].self_attn
    slow = [*range(18, half), *range(half + 18, size)]
    query, key = second.q_proj.weight, second.k_proj.weight
    query[:size], key[:size] = 0, 0
    query[slow], key[slow] = 3 * sees[: len(slow)], 3 * sees[: len(slow)] @ Q1.T
    second.v_proj.weight[:size] = tells
    second.o_proj.weight[:, :size] = 8 * Q2 @ tells.T


def train_tokenizer(texts, names, vocab_size):
    """The bytes of a SentencePiece BPE with byte fallback and LLaMA's special ids (0 unknown, 1
    BOS, 2 EOS), in which each of names is one piece. Raises RuntimeError if the texts do not give
    so many pieces."""
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        user_defined_symbols=names,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def name_pieces(folder, names):
    """Have tokenizer_config.json name the pieces that no merge makes: llama.cpp's converter does
    not see in tokenizer.model that they are user-defined, and would split 胸腔积液 in four."""
    tell_transformers(folder)
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    flags = {"special": False, "normalized": False, "lstrip": False, "rstrip": False}
    added = {pieces.piece_to_id(name): {"content": name, **flags} for name in names}
    file = folder / "tokenizer_config.json"
    write_json(file, read_json_file(file) | {"added_tokens_decoder": added})


if __name__ == "__main__":
    what, path, *more = sys.argv[1:]
    entities = read_knowledge(DATA / "knowledge.jsonl")
    forms, talk = read_json_file(DATA / "forms.json"), read_json_file(DATA / "talk.json")
    if what == "documents":
        passes, exercises, seed = map(int, more)
        rng = random.Random(seed)
        write_lines(path, documents(entities, forms, talk, passes, exercises, rng))
    elif what == "copying":
        model = load_model(path)
        put_in_copying(model, torch.Generator().manual_seed(0))
        save_model(model, *more, path)
    else:
        texts, names = tokenizer_texts(entities, forms, talk), [*kinds_of(entities)]
        pieces = int(*more)
        folder = Path(path)
        (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, names, pieces))
        name_pieces(folder, names)
