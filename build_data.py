"""Knowledge in, training text out, without a network. (Records written by an LLM API come as further subcommands.)

  python build_data.py offline      data/knowledge.jsonl -> data/train.jsonl, data/heldout.jsonl
  python build_data.py sentences    data/knowledge.jsonl -> plain sentences, what a base is trained on
  python build_data.py tokenizer    data/knowledge.jsonl -> a SentencePiece model for a small base

An entity is one object in CMeKG's form: {"中心词": name, "类型": kind, relation: [value, ...], ...}. The Chinese around
it (questions, statements) stands in data/forms.json, by kind and relation; a relation without a form is passed over.
A record is an alpaca record that says where it comes from: {id, instruction, input, output, entity, kind, relations,
values}. The split is by entity: one held out never appears in a training question.
"""
import json
import random
from io import BytesIO
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from generate import DATA, TEMPLATES, load_template, read_records
from lora import read_json_file
from model import Parser, run, write_atomically


def read_knowledge(path):
    """Entities of a knowledge base. Raises ValueError naming the line of a nameless, doubled or misshaped one."""
    entities, names = [], set()
    for number, entity in read_records(path):
        name, kind = entity.get("中心词"), entity.get("类型")
        if not isinstance(name, str) or not name.strip() or not isinstance(kind, str):
            raise ValueError(f"{path} line {number}: 中心词 and 类型 want a text each, got {name!r} and {kind!r}")
        if name in names:
            raise ValueError(f"{path} line {number}: entity {name} stands there twice")
        names.add(name)
        for relation, values in entity.items():
            if relation not in ("中心词", "类型") and not (isinstance(values, list) and values and
                                                       all(isinstance(v, str) and v.strip() for v in values)):
                raise ValueError(f"{path} line {number}: {relation} of {name} is {values!r}, wanted a list of texts")
        entities.append(entity)
    return entities


def facts(entity, forms):
    """[(relation, its forms, the values as one text, the values), ...] of an entity, in the order of data/forms.json.
    辨证论治 is made of two relations: the i-th formula is the one for the i-th pattern."""
    found = []
    for relation, form in forms.get(entity["类型"], {}).items():
        values = entity.get(relation, [])
        text = "、".join(values)
        if relation == "辨证论治":
            pairs = list(zip(entity.get("中医证型", []), entity.get("常用方剂", [])))
            text, values = "，".join(f"{p}用{f}" for p, f in pairs), [v for pair in pairs for v in pair]
        if values:
            found.append((relation, form, text, values))
    return found


def split_entities(entities, share, seed):
    """(training entities, held-out ones): the given share of every kind, drawn by seed. A name that is part of
    another one (四逆汤 in 当归四逆汤) is never held out, since it would appear in a question about the other."""
    rng, heldout = random.Random(seed), set()
    names = [e["中心词"] for e in entities]
    for kind in dict.fromkeys(e["类型"] for e in entities):
        own = [e["中心词"] for e in entities if e["类型"] == kind]
        free = [n for n in own if not any(n in other and n != other for other in names)]
        heldout.update(rng.sample(free, min(len(free), round(share * len(own)))))
    return [e for e in entities if e["中心词"] not in heldout], [e for e in entities if e["中心词"] in heldout]


def write_records(entities, forms, questions, rng):
    """At most `questions` records per fact of each entity, with different question forms, plus one per entity that
    asks for two relations at once."""
    records = []

    def add(entity, relations, form, question, output, values):
        name = entity["中心词"]
        records.append({"id": f"{name}/{'+'.join(relations)}/{form}", "instruction": question, "input": "", "output": output,
                        "entity": name, "kind": entity["类型"], "relations": relations, "values": values})

    for entity in entities:
        name, own = entity["中心词"], facts(entity, forms)
        for relation, form, text, values in own:
            for i in rng.sample(range(len(form["questions"])), min(questions, len(form["questions"]))):
                add(entity, [relation], i, form["questions"][i].format(e=name), form["statements"][0].format(e=name, v=text),
                    values)
        if len(own) > 1:
            (r1, f1, t1, v1), (r2, f2, t2, v2) = rng.sample(own, 2)
            add(entity, [r1, r2], "pair", f"请介绍{name}的{r1}和{r2}。",
                f1["statements"][0].format(e=name, v=t1) + f2["statements"][0].format(e=name, v=t2), v1 + v2)
    return records


def write_sentences(entities, forms, passes, rng):
    """Plain documents: for every entity and pass, all its facts in a random order and phrasing, broken at random
    into documents of one to six statements. Every statement names the entity, so that each fact is stored under the
    name and can be asked for alone (Allen-Zhu & Li 2023, Physics of Language Models 3.1: augmentation)."""
    documents = []
    for _ in range(passes):
        for entity in entities:
            own = facts(entity, forms)
            statements = [rng.choice(form["statements"]).format(e=entity["中心词"], v=text) for _, form, text, _ in own]
            rng.shuffle(statements)
            while statements:
                n = rng.randint(1, 6)
                documents.append({"instruction": "", "input": "", "output": "".join(statements[:n])})
                statements = statements[n:]
    rng.shuffle(documents)
    return documents


def train_tokenizer(entities, forms, vocab_size):
    """The bytes of a SentencePiece BPE with byte fallback and LLaMA's special ids (0 unknown, 1 BOS, 2 EOS), trained on
    the names, values and forms each for itself, so that no piece crosses the border of a term."""
    texts = []
    for entity in entities:
        for _, form, _, values in facts(entity, forms):
            texts += [entity["中心词"], *values]
            for text in form["questions"] + form["statements"]:
                texts += [part for part in text.replace("{v}", "{e}").split("{e}") if part]
    for path in sorted(TEMPLATES.glob("*.json")):
        template = load_template(path)
        texts += [line for line in template["prompt_no_input"].replace("{instruction}", "").split("\n") if line.strip()]
    model = BytesIO()
    try:
        SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
                                   byte_fallback=True, character_coverage=1.0, split_digits=True, add_dummy_prefix=False, minloglevel=2,
                                   normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1)
    except RuntimeError as error:
        raise ValueError(f"SentencePiece cannot make {vocab_size} pieces of this text: {error}") from None
    return model.getvalue()


def write_lines(path, records):
    """Write records as JSON lines, replacing the file at once, and say so."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, lambda p: p.write_text(lines, encoding="utf-8"))
    print(f"{path}: {len(records):,} records")


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    offline = commands.add_parser("offline", help="instruction records from forms, split by entity")
    offline.add_argument("--output_dir", default=str(DATA), help="folder for train.jsonl and heldout.jsonl")
    offline.add_argument("--heldout", type=float, default=0.1, help="share of the entities that is held out")
    offline.add_argument("--questions", type=int, default=2, help="question forms per fact in train.jsonl (held out: 1)")
    sentences = commands.add_parser("sentences", help="plain sentences to train a base on")
    sentences.add_argument("--output", required=True, help="file to write")
    sentences.add_argument("--passes", type=int, default=30, help="how often each fact is told")
    tokenizer = commands.add_parser("tokenizer", help="a SentencePiece model for a small base")
    tokenizer.add_argument("--output", required=True, help="file to write")
    tokenizer.add_argument("--vocab_size", type=int, default=4096, help="pieces, the 256 bytes included")
    for command in (offline, sentences, tokenizer):
        command.add_argument("--knowledge", default=str(DATA / "knowledge.jsonl"), help="knowledge base")
        command.add_argument("--forms", default=str(DATA / "forms.json"), help="questions and statements by relation")
        command.add_argument("--seed", type=int, default=0, help="of every random choice")
    args = parser.parse_args()
    entities, forms = read_knowledge(args.knowledge), read_json_file(args.forms)
    if args.command == "offline":
        if not 0 < args.heldout < 1 or args.questions < 1:
            raise ValueError(f"heldout {args.heldout}, questions {args.questions}: wanted 0 < heldout < 1 and at least 1")
        train, heldout = split_entities(entities, args.heldout, args.seed)
        write_lines(Path(args.output_dir) / "train.jsonl", write_records(train, forms, args.questions, random.Random(args.seed)))
        write_lines(Path(args.output_dir) / "heldout.jsonl", write_records(heldout, forms, 1, random.Random(args.seed)))
    elif args.command == "sentences":
        write_lines(args.output, write_sentences(entities, forms, args.passes, random.Random(args.seed)))
    else:
        model = train_tokenizer(entities, forms, args.vocab_size)
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, lambda p: p.write_bytes(model))
        print(f"{args.output}: {args.vocab_size:,} pieces")


if __name__ == "__main__":
    run(main)
