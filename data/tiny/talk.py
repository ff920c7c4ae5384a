"""Records that make the small model safe to show: it chats, chooses, judges, warns and declines.

python data/tiny/talk.py FOLDER     writes talks.jsonl and dialogues.jsonl there

Made from the knowledge base, forms.json and talk.json, a small grammar: {name} in a text is
what `Words` has under that name, or one of the list of that name, filled in the same way. A recipe
makes the turns of a record.
"""

import random
import re
import sys
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from build_data import (  # noqa: E402
    answer,
    facts_of,
    kinds_of,
    offline_record,
    read_forms,
    read_knowledge,
    split_entities,
    unique,
    values_in,
    write_lines,
)
from generate import DATA  # noqa: E402
from model import read_json_file  # noqa: E402


class Words(dict):
    """Texts by name. One that is not given is drawn from the list of that name in talk, and the
    names in it are filled in the same way: a grammar, whose sentences are questions and answers."""

    def __init__(self, talk, rng, *told):
        """told: (fact, all facts of its entity), ...; of the first there are e0, r0, it0 (entity,
        relation, pronoun), q0 (question), p0 (with the pronoun), s0 (statement), say0 (of v) and
        t0 (answer)."""
        self.talk, self.rng = dict(talk), rng
        for i, (fact, own) in enumerate(told):
            it = rng.choice(talk[fact.kind])
            asks, says = fact.form["questions"], fact.form["statements"]
            self.update({f"e{i}": fact.entity, f"r{i}": fact.relation, f"it{i}": it})
            self[f"t{i}"] = answer([fact], own, rng)
            self.talk[f"q{i}"] = [ask.format(e=fact.entity) for ask in asks]
            self.talk[f"p{i}"] = [
                ask.format(e=it) for ask in asks if "？" in ask and "{e}这" not in ask
            ]
            self.talk[f"s{i}"] = [say.format(e=fact.entity, v=fact.text) for say in says]
            self.talk[f"say{i}"] = [say.replace("{e}", fact.entity) for say in says]

    def __missing__(self, name):
        return self.rng.choice(self.talk[name]).format_map(self)


def talks(entities, forms, talk, rng):
    """Yield (form, turns, facts) by the recipes of talk: conversations, questions with options,
    statements to judge."""
    known = [facts_of(entity, forms) for entity in entities]
    for fact, own in chain(*(zip(own.values(), repeat(own)) for own in known)):
        words, told = words_about(fact, own, known, talk, rng)
        for name, recipe in talk["recipes"].items():
            words["v"] = words.get(recipe["v"])  # what is chosen or judged
            if rng.random() < recipe["share"] and (words["v"] or not recipe["v"]):
                turns = recipe["turns"][: rng.randint(1, len(recipe["turns"]))]
                said = [(ask.format_map(words), text.format_map(words)) for ask, text, _ in turns]
                yield name, said, [told[turns[-1][-1]][0]]


def words_about(fact, own, known, talk, rng):
    """(Words, the facts they are about): fact 0 is the one given, 1 another of its entity, 2 the
    same as 1 of another entity, 3 another of that. x is a value of fact 0, w0 to w2 are foreign
    ones; a to d are these four, l is the letter of x, and looked compares up to it."""
    again = rng.choice([one for one in own.values() if one is not fact] or [fact])
    other = rng.choice([other for other in known if again.relation in other])
    like, last = other[again.relation], rng.choice([*other.values()])
    told = (fact, own), (again, own), (like, other), (last, other)
    words, wrong = Words(talk, rng, *told), foreign_values(fact, own, known)
    if len(wrong) > 2:
        options = [rng.choice(fact.values), *rng.sample(wrong, 3)]
        words.update(zip(("x", "w0", "w1", "w2"), options))
        rng.shuffle(options)
        right = options.index(words["x"])
        words.update(zip("abcd", options), l="ABCD"[right])
        # Each line is looked at in turn: to copy it is easy, to look its letter up is not. Behind
        # three that do not fit the fourth need not be looked at.
        words["lines"] = words["lines"]  # one choice for question and answer
        looked = zip(words["lines"].split("\n")[:3], ["不符"] * right + ["相符"])
        words["looked"] = "".join(f"{line}{fits}，" for line, fits in looked)
    return words, told


def comprehension(entities, forms, talk, rng):
    """Yield (form, turns, no facts) of choices and statements to judge whose fact stands before
    the question: of names that nobody has, with values drawn at random, so that only reading
    answers them."""
    known = [facts_of(entity, forms) for entity in entities]
    kinds, values = kinds_of(entities), {}
    for own in known:
        for fact in own.values():
            values.setdefault((fact.kind, fact.relation), []).extend(fact.values)
    for fact in chain(*(own.values() for own in known)):
        same = [name for name in kinds if kinds[name] == fact.kind]
        drawn = unique(rng.choices(values[fact.kind, fact.relation], k=len(fact.values)))
        fact = replace(fact, entity=invented(rng, same), values=drawn, text="、".join(drawn))
        words, _ = words_about(fact, {fact.relation: fact}, known, talk, rng)
        name = rng.choice(("choice", "choice", "true", "false"))
        recipe = talk["recipes"][name]
        words["v"] = words.get(recipe["v"])
        if words["v"] and fact.entity not in kinds:
            ask, text, _ = recipe["turns"][0]
            yield name, [(f"{{given}}\n{ask}".format_map(words), text.format_map(words))], []


def invented(rng, names):
    """A name that looks like one: the head of one and the tail of another."""
    a, b = rng.sample(names, 2)
    return a[: len(a) // 2] + b[len(b) // 2 :]


def foreign_values(fact, own, known):
    """What other entities of the kind have under a fact's relation, unless they are of its class:
    what is no value of 麻黄 may still be true of it where 桂枝 has it."""
    if fact.relation == "辨证论治":  # pairs of pattern and formula are no single values
        return []
    theirs = [
        other[fact.relation]
        for other in known
        if fact.relation in other and not classes(own) & classes(other)
    ]
    # Of one kind and relation there is one form.
    found = unique(values_in(like for like in theirs if like.form is fact.form))
    # What the fact's text holds would be right (苦 in 微苦).
    return [
        value for value in found if value not in fact.text and not names_any(value, fact.values)
    ]


def classes(own):
    return {*values_in(own[name] for name in ("所属科室", "分类") if name in own)}


def names_any(text, names):
    return any(name in text for name in names)


def outside(entities, forms, talk, rng):
    """Yield (form, turns, no facts) of what the knowledge base does not answer: the groups of talk,
    and questions about names that no entity has."""
    kinds, groups = kinds_of(entities), talk["outside"]
    for kind, names in talk["names"].items():
        own = [name for name in kinds if kinds[name] == kind]
        names = [*names, *(invented(rng, own) for _ in own)]
        asks = [ask for form in forms[kind].values() for ask in form["questions"]]
        asks = [ask.replace("{e}", "{x}") for ask in asks]
        unknown = {"questions": asks, "answers": talk["unknown"], "x": {*names} - kinds.keys()}
        groups = [*groups, unknown]
    # Fixed questions are few; four times over they are met often enough in one reading.
    for group in chain(*(repeat(group, 1 if "x" in group else 4) for group in groups)):
        for x in sorted(group.get("x", [""])):
            for ask in [rng.choice(group["questions"])] if x else group["questions"]:
                turn = ask.format(x=x), rng.choice(group["answers"])
                yield f"outside/{turn[0]}", [turn], []


def pairs(entities, forms, talk, rng):
    """Yield (form, turns, facts): may two herbs be taken together? Of each pair that a caution
    names, and of as many that none does, twice each. The caution is told first: whether a
    name stands in what has just been said is easily seen, and what one knows is not."""
    herbs = [facts_of(entity, forms) for entity in entities if entity["类型"] == "中药"]
    known = {own["使用注意"].entity: own for own in herbs if "使用注意" in own}
    for name, own in known.items():
        fact = own["使用注意"]
        apart = re.findall("不宜与(.+?)同用", fact.text)
        free = [other for other in known if other != name and other not in fact.text]
        others = [*apart, *rng.sample(free, len(apart))] * 2
        for i, other in enumerate(others):
            words = Words(talk, rng)
            words |= {"a": name, "b": other, "told": answer([fact], own, rng)}
            turn = words["together"], words["apart" if other in fact.text else "free"]
            yield f"with-{other}-{i}", [turn], [fact]


def records(entities, hidden, forms, talk, seed=0, makers=(talks, pairs, outside)):
    """All of them about some entities, one in three behind a system message, but for those in
    which a user names one that is hidden: an option or an invented name might."""
    rng, made = random.Random(seed), []
    for make in makers:
        for form, turns, told in make(entities, forms, talk, rng):
            if not names_any("\n".join(question for question, _ in turns), hidden):
                system = rng.choice(["", "", Words(talk, rng)["systems"]])
                made.append(offline_record(form, turns, told, system))
    return made


if __name__ == "__main__":
    train, held_out = split_entities(read_knowledge(DATA / "knowledge.jsonl"), 0.1, 0)
    forms, talk = read_forms(DATA / "forms.json"), read_json_file(DATA / "talk.json")
    made = records(train, [*kinds_of(held_out)], forms, talk)
    # One conversation would make a whole file one of conversations (`read_instructions`).
    for name, several in (("talks", False), ("dialogues", True)):
        part = [record for record in made if ("<bot>" in record["instruction"]) == several]
        write_lines(f"{sys.argv[1]}/{name}.jsonl", part)
