"""train.py: the gradient, the targets, resuming, the whole run, and bad input."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import generate as G
import lora as L
import model as M
import train as T

import pytest
import torch
from conftest import RECORDS, ROOT, plain_prompt


def prepared(base, **settings):
    """(config, model with adapter, rows) of the eight records."""
    settings = {
        "output_dir": "",
        "base_model": str(base),
        "batch_size": 8,
        "micro_batch_size": 4,
        "num_epochs": 1,
        "save_steps": 0,
        "lora_dropout": 0.0,
        "learning_rate": 1e-2,
        **settings,
    }
    config = T.TrainConfig(**settings)
    model, tokenizer = G.load_base(base, "cpu", torch.float32)
    torch.manual_seed(0)
    if config.full:
        model.requires_grad_(True)
    else:
        L.add_lora(model, L.LoRAConfig(8, 16, config.lora_dropout, ("all",)))
    template = G.load_template("med_template")
    rows = [T.encode_example(tokenizer, template, r, config) for r in RECORDS]
    return config, model, rows


@pytest.mark.parametrize("full", [False, True])
def test_gradient_does_not_depend_on_the_micro_batch(base, full):
    """8 rows of unequal length as 1x8, 2x4, 4x2, 8x1."""
    grads = []
    for size in (8, 4, 2, 1):
        config, model, rows = prepared(base, micro_batch_size=size, full=full)
        for _, module in L.lora_linears(model):
            module.lora_b.data.fill_(0.01)
        T.step_gradient(model, rows, config)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert all((g - grads[0]).norm() / grads[0].norm() < 1e-5 for g in grads[1:])


def test_validation_changes_no_weight(base):
    config, model, rows = prepared(base, lora_dropout=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    T.evaluate(model, rows, config)
    assert model.training
    model.eval()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_targets_are_the_answer_and_eos(base):
    tokenizer, template = G.load_tokenizer(base), G.load_template("med_template")
    for record in RECORDS:
        config = T.TrainConfig()
        row = T.encode_example(tokenizer, template, record, config)
        ids, labels, _ = T.collate([row, T.Row(row.ids + [9, 9], row.mask + [False, True])], "cpu")
        targets, count = labels[labels != -100].tolist(), T.target_count([row])
        assert targets[count:] == targets[:count] + [9] and not row.mask[0]
        assert (
            targets[count - 1] == tokenizer.eos_id
            and tokenizer.decode(targets[: count - 1]) == record["output"]
        )
        config = T.TrainConfig(cutoff_len=len(row.ids) - 2)  # cut inside the last character
        cut = T.encode_example(tokenizer, template, record, config)
        assert cut.ids[-1] == tokenizer.eos_id and record["output"].startswith(
            tokenizer.decode(cut.ids[cut.mask.index(True) : -1])
        )
        config = T.TrainConfig(cutoff_len=row.mask.index(True) + 1)
        assert T.encode_example(tokenizer, template, record, config) is None


BENTSAO = ROOT.parent / "shared" / "data"


def bentsao_tokenizer(folder):
    """LLaMA's tokenizer, in a folder of the name that a base has it under."""
    shutil.copyfile(BENTSAO / "llama_tokenizer.model", folder / "tokenizer.model")
    return G.load_tokenizer(folder)


@pytest.mark.skipif(
    not BENTSAO.is_dir(), reason="BenTsao's records and tokenizer are not beside the project"
)
def test_every_bentsao_record_trains_its_eos(tmp_path):
    """8,658 records with LLaMA's tokenizer: EOS is each row's last target, and the split encoding
    is the joint one."""
    tokenizer, template = bentsao_tokenizer(tmp_path), G.load_template("med_template")
    records, cut = G.read_instructions(BENTSAO / "bentsao_llama_data.json", answers=True), 0
    for r in records:
        row = T.encode_example(tokenizer, template, r, T.TrainConfig())
        assert (
            row.ids[-1] == tokenizer.eos_id
            and row.mask[-1]
            and row.mask.index(True) < len(row.ids) - 1 <= 511
        )
        joint = tokenizer.encode(
            plain_prompt(template, r["instruction"]) + r["output"], bos=True, eos=True
        )
        cut += joint != row.ids
    assert len(records) == 8658 and cut == 13  # the 13 longer than 512


def test_lr_at():
    config = T.TrainConfig(learning_rate=1.0, warmup_steps=4)
    assert [T.lr_at(s, 44, config) for s in (0, 3, 4, 24, 43)] == [0.25, 1.0, 1.0, 0.5, 0.025]


def test_overfits_and_stops(base, tmp_path):
    """Eight records learnt by heart: every greedy answer is the reference and ends by EOS."""
    config, model, rows = prepared(
        base, num_epochs=150, full=True, learning_rate=1e-2, group_by_length=True
    )
    history = T.train(config, model, (rows, []))
    assert history[-1]["loss"] < 0.05 < history[0]["loss"]
    tokenizer, template = G.load_tokenizer(base), G.load_template("med_template")
    records = T.answer_all(model, tokenizer, template, RECORDS, "after")
    answers = [r["after"] for r in records]
    assert sum(a == r["output"] for a, r in zip(answers, RECORDS)) >= 7
    assert T.facts_recalled(RECORDS, answers) > 0.8 and T.facts_recalled(RECORDS, [""] * 8) == 0


def test_bf16_base_keeps_float32_adapters(base):
    model, _ = G.load_base(base, "cpu", torch.bfloat16)
    L.add_lora(model, L.LoRAConfig(4, 8, 0.0, ("all",)))
    config, _, rows = prepared(base)
    T.step_gradient(model, rows, config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def command(script, *args):
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_bentsaos_command_line_runs(base, records, tmp_path):
    """Fire's spellings, one flag of each; then the adapter answers, and knows its template and
    base."""
    done = command(
        "train.py",
        "--base_model",
        base,
        "--data_path",
        records,
        "--output-dir",
        tmp_path / "out",
        "--batch_size=4",
        "--micro_batch_size",
        2,
        "--num_epochs=1",
        "--learning_rate",
        "3e-4",
        "--cutoff_len=256",
        "--val_set_size",
        2,
        "--lora_r=4",
        "--lora_alpha",
        16,
        "--lora_dropout=0.05",
        "--lora_target_modules",
        "[q_proj,v_proj]",
        "--train_on_inputs",
        "False",
        "--group_by_length",
        "--prompt_template_name=med_template",
        "--wandb_run_name",
        "e1",
        "--max_steps",
        2,
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "run.json",
        "log.jsonl",
        "loss.svg",
        "answers.jsonl",
    }
    assert json.loads((tmp_path / "out/run.json").read_text())["config"]["group_by_length"] is True
    assert (tmp_path / "out/loss.svg").read_text().startswith("<svg")
    asked = command(
        "generate.py", "黄芪？", "--lora_weights", tmp_path / "out", "--max_new_tokens", 4
    )
    assert asked.returncode == 0, asked.stderr
    merged = command(
        "lora.py",
        "merge",
        "--base_model",
        base,
        "--lora_weights",
        tmp_path / "out",
        "--output_dir",
        tmp_path / "m",
    )
    assert merged.returncode == 0 and "on average" in merged.stdout


@pytest.mark.slow
@pytest.mark.skipif(not BENTSAO.is_dir(), reason="BenTsao's records are not beside the project")
def test_bentsaos_finetune_sh_word_for_word(base, tmp_path, monkeypatch, capsys):
    """Its scripts/finetune.sh on its own records, the base's name too, which the hub's local cache
    resolves; two steps of it."""
    cache = tmp_path / "models--decapoda-research--llama-7b-hf"
    shutil.copytree(base, cache / "snapshots" / "5f98ee")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("5f98ee")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/llama_data.json").symlink_to(BENTSAO / "bentsao_llama_data.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    line = (
        "--base_model 'decapoda-research/llama-7b-hf' --data_path './data/llama_data.json' "
        "--output_dir './lora-llama-med-'e1 --prompt_template_name 'med_template' "
        "--micro_batch_size 128 --batch_size 128 --wandb_run_name e1"
    )
    monkeypatch.setattr(sys, "argv", ["finetune.py", *shlex.split(line), "--max_steps", "2"])
    T.main()
    info = json.loads(Path("lora-llama-med-e1/run.json").read_text())
    assert (
        info["config"]["wandb_run_name"] == "e1"
        and info["step"] == 2
        and "8,158 records" in capsys.readouterr().out
    )
    settings = json.loads(Path("lora-llama-med-e1/adapter_config.json").read_text())
    assert (
        settings["base_model_name_or_path"] == "decapoda-research/llama-7b-hf"
        and settings["r"] == 8
    )
    log = [
        json.loads(line) for line in Path("lora-llama-med-e1/log.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in log] == [1, 2] and log[1]["val_loss"] > 0


def test_full_on_a_base_with_added_tokens_can_be_asked(base, tmp_path, records):
    """What `lora.py recover` makes of Alpaca: one row more than tokenizer.model has pieces."""
    padded, size = tmp_path / "padded", G.load_tokenizer(base).vocab_size
    config = replace(M.read_config(base / "config.json"), vocab_size=size + 1)
    M.save_model(M.LLaMA(config), padded)
    shutil.copyfile(base / "tokenizer.model", padded / "tokenizer.model")
    (padded / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    done = command(
        "train.py",
        "--base_model",
        padded,
        "--data_path",
        records,
        "--full",
        "--max_steps",
        1,
        "--val_set_size",
        2,
        "--output_dir",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert G.load_base(tmp_path / "out", "cpu", torch.float32)[0].config == config


def test_settings_of_the_small_base_where_none_is_named(monkeypatch):
    """TINY's settings hold for an empty --base_model too, and its validation file gives way to a
    share of the data."""
    for arguments, base, val in (
        ([], "tiny", "heldout.jsonl"),
        (["--base_model", ""], "tiny", "heldout.jsonl"),
        (["--val_set_size", "2"], "tiny", ""),
        (["--base_model", "x"], "x", ""),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        config = T.parse_config()
        assert (Path(config.base_model).name, Path(config.val_path).name) == (base, val)


def test_answers_that_are_cut_are_counted(base, capsys):
    """One that a cut would end inside a character ends before it, and is counted as well."""
    tokenizer, template = G.load_tokenizer(base), G.load_template("med_template")
    record = {**RECORDS[7], "output": "龘" * 30}  # three byte tokens each
    for cutoff in range(100, 112):
        rows = T.encode_records(tokenizer, template, [record], T.TrainConfig(cutoff_len=cutoff))
        assert "at most 1 answers cut" in capsys.readouterr().out and len(rows[0].ids) <= cutoff


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def damaged(base, folder, how):
    """A copy of the base with one thing wrong."""
    shutil.copytree(base, folder)
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "no weights":
        weights.unlink()
    elif how == "no tokenizer":
        (folder / "tokenizer.model").unlink()
    elif how == "tokenizer":
        shape = replace(M.read_config(folder / "config.json"), vocab_size=256)
        M.save_model(M.LLaMA(shape), folder)
    elif how == "shape":
        change(folder / "config.json", num_key_value_heads=4)
    elif how == "config":
        (folder / "config.json").write_text('{"hidden_size": 32}')
    return folder


GOOD = '{"instruction": "a", "output": "b"}\n'
# name: (arguments over a good command, a word the line must have). @ is a file of what follows,
# BASE a base so damaged
BAD = {
    "missing data": (["--data_path", "nowhere.json"], "nowhere.json"),
    "a folder of data": (["--data_path", "."], ". is no regular file"),
    "one of several files": (
        ["--data_path", "@" + GOOD, "nowhere.json:0.5"],
        "nowhere.json",
    ),
    "a weight of nothing": (["--data_path", "RECORDS:0"], "wanted a number above 0"),
    "a weight that is none": (["--data_path", "RECORDS:-1"], "records.json:-1"),
    "empty data": (["--data_path", "@"], "given.json"),
    "no json": (["--data_path", "@" + GOOD + "{oops\n"], "line 2"),
    "no array": (["--data_path", "@[" + GOOD], "given.json as an array"),
    "no answer": (["--data_path", "@" + GOOD + '{"instruction": "a"}'], "line 2"),
    "blank answer": (["--data_path", '@{"instruction": "a", "output": " "}'], "line 1"),
    "a number for a text": (["--data_path", '@{"instruction": 1, "output": "b"}'], "line 1"),
    "a list for the input": (
        ["--data_path", '@{"instruction": "a", "input": [1], "output": "b"}'],
        "input",
    ),
    "not an object": (["--data_path", "@[1, 2]"], "record 1"),
    "two questions": (
        [
            "--data_path",
            '@{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
        ],
        "line 1",
    ),
    "a tool's message": (
        ["--data_path", '@{"messages": [{"role": "tool", "content": "a"}]}'],
        "line 1",
    ),
    "an open conversation": (
        ["--data_path", '@{"conversations": [{"from": "human", "value": "a"}]}'],
        "the answer is empty",
    ),
    "half a history": (
        ["--data_path", '@{"instruction": "a", "output": "b", "history": [["c"]]}'],
        "line 1",
    ),
    "gbk": (["--data_path", "@gbk"], "UTF-8"),
    "missing validation": (["--val_path", "nowhere.json"], "nowhere.json"),
    "validation too large": (["--val_set_size", "8"], "val_set_size"),
    "template": (["--prompt_template_name", "nope"], "nope.json"),
    "template's file": (["--prompt_template_name", "@nope"], "not JSON"),
    "template's text": (["--prompt_template_name", '@{"prompt_no_input": "?"}'], "{instruction}"),
    "target": (["--lora_target_modules", "x_proj"], "x_proj"),
    "no target": (["--lora_target_modules", "[]"], "targets"),
    "rank": (["--lora_r", "0"], "lora_r"),
    "alpha": (["--lora_alpha", "0"], "lora_alpha"),
    "dropout": (["--lora_dropout", "1.5"], "dropout"),
    "batch": (["--batch_size", "0"], "batch_size"),
    "micro-batch": (["--micro_batch_size", "-1"], "micro_batch_size"),
    "rate": (["--learning_rate", "nan"], "learning_rate"),
    "rate without end": (["--learning_rate", "inf"], "learning_rate"),
    "decay": (["--weight_decay", "nan"], "weight_decay"),
    "norm": (["--max_grad_norm", "0"], "max_grad_norm"),
    "warm-up": (["--warmup_steps", "-5"], "warmup_steps"),
    "cutoff too small": (["--cutoff_len", "10"], "cutoff_len"),
    "text for a number": (["--num_epochs", "many"], "num_epochs"),
    "a number and a half": (["--num_epochs", "1.5"], "num_epochs"),
    "neither yes nor no": (["--full", "maybe"], "full"),
    "unknown option": (["--lora_rank_x", "3"], "lora_rank_x"),
    "which answers": (["--train_on", "first"], "train_on"),
    "dtype": (["--dtype", "fp7"], "fp7"),
    "compiled fp16": (["--dtype", "fp16", "--compile"], "drop --compile"),
    "base_dtype": (["--base_dtype", "int3"], "int3"),
    "all of a frozen base": (["--full", "--base_dtype", "int8"], "--full"),
    "device": (["--device", "cuda:99"], "cuda:99"),
    "a weight that leaves nothing": (
        ["--data_path", "RECORDS:0.05", "--val_set_size", "0"],
        "0.05",
    ),
    "template with other braces": (
        ["--prompt_template_name", '@{"prompt_no_input": "{instruction} as {x}"}'],
        "'x'",
    ),
    "alpha without end": (["--lora_alpha", "inf"], "lora_alpha"),
    "no output": (["--output_dir", ""], "output_dir"),
    "output is a file": (["--output_dir", "@x"], "is a file"),
    "no package": (["--wandb_project", "x"], "pip install wandb"),
    "resume from nothing": (["--resume_from_checkpoint", "checkpoint-7"], "checkpoint-7"),
    "resume from a base": (["--resume_from_checkpoint", "BASE "], "run.json"),
    "a hub's name": (
        ["--base_model", "decapoda-research/llama-7b-hf"],
        "decapoda-research/llama-7b-hf",
    ),
    "truncated weights": (["--base_model", "BASE truncated"], "damaged"),
    "no weights": (["--base_model", "BASE no weights"], "not found"),
    "no tokenizer": (["--base_model", "BASE no tokenizer"], "tokenizer.model"),
    "tokenizer of another size": (["--base_model", "BASE tokenizer"], "pieces"),
    "shape": (["--base_model", "BASE shape"], "k_proj"),
    "config lacks a key": (["--base_model", "BASE config"], "config.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, base, records, tmp_path, monkeypatch, capsys):
    """main() runs in this process for speed; run() is what the script itself calls."""
    arguments, word = BAD[name]
    for i, argument in enumerate(arguments := list(arguments)):
        if argument.startswith("BASE "):
            arguments[i] = str(damaged(base, tmp_path / "base", argument[5:]))
        elif argument.startswith("@"):
            (tmp_path / "given.json").write_bytes(
                '{"instruction": "中药"}'.encode("gbk")
                if argument == "@gbk"
                else argument[1:].encode()
            )
            arguments[i] = str(tmp_path / "given.json")
        arguments[i] = arguments[i].replace("RECORDS", str(records))
    out = tmp_path / "out"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            "--base_model",
            str(base),
            "--data_path",
            str(records),
            "--output_dir",
            str(out),
            "--val_set_size",
            "2",
            *arguments,
        ],
    )
    with pytest.raises(SystemExit) as stop:
        M.run(T.main)
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and word in error
        and error.startswith("error: ")
        and error.count("\n") == 1
    )
    assert not out.exists()


def test_adapter_for_another_shape_is_refused(base, tmp_path):
    config, model, _ = prepared(base)
    L.save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "r": 4}))
    done = command("generate.py", "问", "--base_model", base, "--lora_weights", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "another base" in done.stderr
    none = command("generate.py", "问", "--base_model", base, "--lora_weights", tmp_path / "none")
    assert none.returncode == 2 and "--use_lora False" in none.stderr
