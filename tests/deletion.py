"""Does an answer hang on the training records that tests/audit.py names for it?

  python tests/deletion.py --output_dir deletion

A base that has read a fact may tell it without a record. So the facts here stand in the records
alone: the effects (功效) of some herbs change places, and what a tuned model says of them it has
from its records, for the base has read otherwise. It is tuned three times: on all records, without
those that audit names for its answers on these herbs, and without as many others. The first
deletion should change each answer, the second none. Each answer is judged by itself, but one
training deletes the records of all herbs, since those of another state nothing of this one. Herbs
beside them keep theirs, so that how to answer such a question is learnt in any case.

Printed, and written as deletion.jsonl: of each herb the number of records named, what is told in
the three cases, and what the base has read. Three trainings take about two minutes on one core.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import build_data  # noqa: E402
import generate  # noqa: E402
import train  # noqa: E402
from build_data import check_sources, read_knowledge, write_lines  # noqa: E402
from generate import DATA, read_instructions  # noqa: E402
from model import Parser, check_settings, read_json_file, run, to_json  # noqa: E402

from audit import Evidence, read_answers  # noqa: E402

KEPT = ("中心词", "类型", "性味", "功效")  # what the records tell of a herb


@dataclass
class Settings:
    """What is tuned."""

    output_dir: str = "deletion"  # folder for records, adapters and answers
    base_model: str = str(DATA / "tiny")  # the base
    facts: int = 12  # herbs whose effects change places; one or two are not learnt
    others: int = 12  # herbs beside them
    epochs: int = 10  # of each training
    seed: int = 0  # of every draw

    __post_init__ = check_settings


def command(script, *argv):
    """Run a script as its command line would, in this process."""
    sys.argv = [f"{script.__name__}.py", *map(str, argv)]
    print("python", *sys.argv, flush=True)
    script.main()


class World:
    """Herbs, some of whose effects changed places, and the records on them."""

    def __init__(self, settings):
        self.settings, self.folder = settings, Path(settings.output_dir).resolve()
        entities = read_knowledge(DATA / "knowledge.jsonl")
        herbs = [{r: v for r, v in e.items() if r in KEPT} for e in entities if e["类型"] == "中药"]
        herbs = random.Random(settings.seed).sample(herbs, settings.facts + settings.others)
        self.herbs = herbs[: settings.facts]
        self.read = {herb["中心词"]: herb["功效"] for herb in self.herbs}
        effects = [*self.read.values()]
        for herb, effect in zip(self.herbs, effects[1:] + effects[:1]):
            herb["功效"] = effect
        write_lines(self.folder / "kb.jsonl", herbs)
        made = ["--knowledge", self.folder / "kb.jsonl", "--output_dir", self.folder]
        command(build_data, "offline", *made, "--heldout", 0.001)
        self.records = read_instructions(self.folder / "train.jsonl", answers=True)
        check_sources("train.jsonl", self.records)
        self.evidence = Evidence(herbs, self.records, read_json_file(DATA / "safety.json"))

    def answers(self, name, without=()):
        """{herb: claims on its effects} of a model tuned without the records of some ids."""
        folder, settings = self.folder / name, self.settings
        questions = [{"instruction": f"{h['中心词']}的功效是什么？"} for h in self.herbs]
        write_lines(folder / "train.jsonl", [r for r in self.records if r["id"] not in without])
        write_lines(folder / "questions.jsonl", questions)
        tune = ["--base_model", settings.base_model, "--data_path", folder / "train.jsonl"]
        tune += ["--output_dir", folder / "tuned", "--overwrite", "True"]
        tune += ["--num_epochs", settings.epochs, "--seed", settings.seed, "--dtype", "fp32"]
        tune += ["--val_set_size", 0, "--num_answers", 0, "--save_steps", 0]
        # Enough to know its few hundred records by heart.
        tune += ["--batch_size", 16, "--learning_rate", 3e-3, "--lora_r", 32, "--lora_alpha", 64]
        tune += ["--lora_target_modules", "all", "--prompt_template_name", "bare"]
        command(train, *tune)
        said = folder / "answers.jsonl"
        said.unlink(missing_ok=True)
        ask = ["--base_model", settings.base_model, "--lora_weights", folder / "tuned"]
        ask += ["--instruct_dir", folder / "questions.jsonl", "--max_new_tokens", 64]
        command(generate, *ask, "--output", said)
        found = {}
        for herb, row in zip(self.read, read_answers(said)):
            claims = self.evidence.claims(row["instruction"], row["answer"])
            found[herb] = [claim for claim in claims if claim.relation == "功效"]
        return found


def told(claims):
    return [claim.text for claim in claims]


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_settings(Settings)
    world = World(settings := Settings(**vars(parser.parse_args())))
    first = world.answers("all")
    # A fact counts if the model has learnt it: all that it tells is so in this world.
    learnt = [h for h in world.read if {c.status for c in first[h]} == {"supported"}]
    named = {herb: {id for claim in first[herb] for id in claim.records} for herb in learnt}
    ids = set().union(*named.values())
    others = [record["id"] for record in world.records if record["id"] not in ids]
    chosen = set(random.Random(settings.seed).sample(others, len(ids)))
    without = {"named": world.answers("named", ids), "random": world.answers("random", chosen)}
    rows = []
    for herb in learnt:
        after = {label: told(answers[herb]) for label, answers in without.items()}
        row = {"herb": herb, "records": len(named[herb]), "all": told(first[herb]), **after}
        rows.append(row | {"read": world.read[herb]})
        print(to_json(rows[-1]))
    write_lines(world.folder / "deletion.jsonl", rows)
    print(f"learnt: {len(learnt)} of {settings.facts} facts")
    print(f"named: {len(ids)} of {len(world.records)} records")
    for label in without:
        changed = sum(row[label] != row["all"] for row in rows)
        print(f"without the {label} records: {changed} of {len(rows)} answers changed")
    back = sum(set(row["named"]) == set(row["read"]) for row in rows)
    print(f"without the named records, what the base has read: {back} of {len(rows)}")


if __name__ == "__main__":
    run(main)
