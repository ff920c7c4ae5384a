"""Does an answer hang on the training records that tests/audit.py names for it?

  python tests/deletion.py --output_dir deletion

A small world: the effects (功效) of some herbs change places, so that a base that has read the true
ones must learn these from its records. The base is tuned on the records of this world and asked;
then, for each herb whose answer audit finds supported, tuned again without the records that audit
names, and without as many others. The first should change the answer, the second should not. A run
makes 1 + 2 * facts trainings: on two cores about half a minute each.
"""

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from audit import Evidence, read_answers  # noqa: E402

from build_data import check_sources, read_knowledge, write_lines  # noqa: E402
from generate import DATA, read_instructions  # noqa: E402
from model import Parser, check_settings, read_json_file, run  # noqa: E402

ROOT = Path(__file__).parent.parent


@dataclass
class Settings:
    """What is tuned, and how often."""

    output_dir: str = "deletion"  # folder for records, adapters and answers
    base_model: str = str(DATA / "tiny")  # the base
    facts: int = 10  # herbs whose effects change places
    others: int = 4  # entities beside them
    epochs: int = 12  # of each training
    seed: int = 0  # of every draw

    __post_init__ = check_settings


def command(script, *argv):
    print("python", script, *argv, flush=True)
    subprocess.run([sys.executable, ROOT / script, *map(str, argv)], check=True, cwd=ROOT)


class World:
    """The knowledge base with effects that changed places, its records, and a model tuned on some
    of them."""

    def __init__(self, settings):
        self.settings, self.folder = settings, Path(settings.output_dir).resolve()
        rng = random.Random(settings.seed)
        entities = read_knowledge(DATA / "knowledge.jsonl")
        herbs = [e for e in entities if e["类型"] == "中药"]
        self.herbs = rng.sample(herbs, settings.facts)
        effects = [herb["功效"] for herb in self.herbs]
        for herb, effect in zip(self.herbs, effects[1:] + effects[:1]):
            herb["功效"] = effect
        rest = [e for e in entities if e not in self.herbs]
        self.entities = self.herbs + rng.sample(rest, settings.others)
        write_lines(self.folder / "kb.jsonl", self.entities)
        made = ["--knowledge", self.folder / "kb.jsonl", "--output_dir", self.folder]
        command("build_data.py", "offline", *made, "--heldout", 0.001)
        self.records = read_instructions(self.folder / "train.jsonl", answers=True)
        check_sources("train.jsonl", self.records)

    def answers(self, name, without=()):
        """{herb: its effects as claimed} by a model tuned without the records of some ids."""
        folder, settings = self.folder / name, self.settings
        questions = [{"instruction": f"{h['中心词']}的功效是什么？"} for h in self.herbs]
        write_lines(folder / "train.jsonl", [r for r in self.records if r["id"] not in without])
        write_lines(folder / "questions.jsonl", questions)
        tune = ["--base_model", settings.base_model, "--data_path", folder / "train.jsonl"]
        tune += ["--output_dir", folder / "tuned", "--num_epochs", settings.epochs]
        tune += ["--val_set_size", 0, "--num_answers", 0, "--save_steps", 0, "--dtype", "fp32"]
        # Enough to know its few hundred records by heart.
        tune += ["--batch_size", 16, "--learning_rate", 3e-3, "--lora_r", 32, "--lora_alpha", 64]
        tune += ["--lora_target_modules", "all", "--prompt_template_name", "bare"]
        command("train.py", *tune, "--seed", settings.seed)
        ask = ["--base_model", settings.base_model, "--lora_weights", folder / "tuned"]
        ask += ["--instruct_dir", folder / "questions.jsonl", "--max_new_tokens", 64]
        command("generate.py", *ask, "--output", folder / "answers.jsonl")
        safety = read_json_file(DATA / "safety.json")
        evidence = Evidence(self.entities, self.records, safety)
        found = {}
        for herb, row in zip(self.herbs, read_answers(folder / "answers.jsonl")):
            claims = evidence.claims(row["instruction"], row["answer"])
            found[herb["中心词"]] = [claim for claim in claims if claim.relation == "功效"]
        return found


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_settings(Settings)
    settings = Settings(**vars(parser.parse_args()))
    world, rng = World(settings), random.Random(settings.seed)
    first = world.answers("all")
    told = {name: [c.text for c in claims] for name, claims in first.items()}
    rows = []
    for name, claims in first.items():
        supported = [claim for claim in claims if claim.status == "supported"]
        if not supported or len(supported) < len(claims):
            continue
        named = {id for claim in supported for id in claim.records}
        others = [r["id"] for r in world.records if r["id"] not in named]
        row = {"herb": name, "records": len(named)}
        for label, without in (("named", named), ("random", rng.sample(others, len(named)))):
            after = world.answers(f"{name}-{label}", set(without))[name]
            row[label] = [claim.text for claim in after] != told[name]
        rows.append(row)
        print(json.dumps(row, ensure_ascii=False), flush=True)
    write_lines(world.folder / "deletion.jsonl", rows)
    for label in ("named", "random"):
        changed = sum(row[label] for row in rows)
        print(f"without the {label} records: {changed} of {len(rows)} answers changed")


if __name__ == "__main__":
    run(main)
