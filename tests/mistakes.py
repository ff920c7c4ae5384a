"""The first mistakes of a newcomer, and the sentence that each gets.

  python tests/mistakes.py          runs them all and prints a table: mistake, exit code, sentence

`test_users.py` runs the same list: each ends with exit code 2 and one line that names the cause.
"""

import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import build_data  # noqa: E402
import generate  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

MAINS = {module.__name__: module.main for module in (model, lora, generate, train, build_data)}
TINY = ROOT / "data" / "tiny"
GOOD = {"instruction": "黄芪有什么功效？", "input": "", "output": "补气升阳。"}
TABLE = "question,answer\n黄芪有什么功效？,补气升阳\n"
# {name: content} of what lies in the folder in which the mistakes are made
FILES = {
    "ok.json": [GOOD] * 3,
    "keys.json": [{"标题": "黄芪", "正文": "补气"}],
    "broken.jsonl": json.dumps(GOOD) + "\n{'instruction': '问'}\n",
    "cut.json": json.dumps([GOOD, GOOD])[:-20],
    "empty.json": "",
    "no_answer.json": [GOOD, {**GOOD, "output": " "}],
    "roles.json": [{"messages": [{"role": "user", "content": "问"}] * 2}],
    "gbk.csv": TABLE.encode("gbk"),
    "utf16.csv": TABLE.encode("utf-16"),
    "book.xlsx": b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0\xe3",
    "rows.parquet": b"PAR1\x15\x04\x15\xff",
    "commas.csv": "question,answer\n黄芪有什么功效？,补气,升阳\n",
    "header.csv": "question,answer\n",
    "questions.txt": "黄芪有什么功效？\n",
    "template.json": {"prompt_no_input": "问题：{question}"},
    "triples.csv": "黄芪,功效,补气\n当归,补血\n",
    "entities.jsonl": '{"中心词": "黄芪", "功效": "补气"}\n',
    "theirs.jsonl": '{"a diary": 1}\n',
    "empty/readme": "",
    "pointer/config.json": (TINY / "config.json").read_bytes(),
    "pointer/model.safetensors": "version https://git-lfs.github.com/spec/v1\nsize 9\n",
    "mute/config.json": (TINY / "config.json").read_bytes(),
    "mute/model.safetensors": (TINY / "model.safetensors").read_bytes(),
    "lora-old/run.json": {"started": 1.0},
    "lora-qwen/adapter_config.json": {"base_model_name_or_path": "Qwen/Qwen3-8B"},
    "a file": "",
}
# (what somebody did, the command line, a part of the sentence that names the cause); TINY is the
# base of the repository, PORT a port in use
MISTAKES = [
    # the order of steps, and paths
    ("asks before anything was trained", "generate 黄芪有什么功效？", "lora-tcm"),
    ("names an adapter that is not there", "generate --lora_weights lora-med 问", "lora-med"),
    ("merges before training", "lora merge --lora_weights lora-tcm --output_dir m", "lora-tcm"),
    ("names a base that is not there", "generate --base_model models/llama 问", "models/llama"),
    ("trains a base that is not there", "train --base_model models/a --data_path ok.json", "/a"),
    (
        "names a model of a hub that was not downloaded",
        "generate --base_model Qwen/Qwen3-8B 问",
        "modelscope download --model Qwen/Qwen3-8B",
    ),
    ("gives a file as the base", "train --base_model ok.json --data_path ok.json", "ok.json"),
    ("gives an empty folder as the base", "generate --base_model empty 问", "weights not found"),
    ("cloned without git lfs", "generate --base_model pointer 问", "git lfs pull"),
    ("forgot the tokenizer", "generate --base_model mute 问", "no tokenizer in mute"),
    ("gives the base as the adapter", "generate --lora_weights TINY 问", "adapter_model"),
    (
        "puts an adapter on another base",
        "generate --base_model TINY --lora_weights lora-qwen 问",
        "Qwen/Qwen3-8B",
    ),
    (
        "merges an adapter into another base",
        "lora merge --base_model TINY --lora_weights lora-qwen --output_dir m",
        "Qwen/Qwen3-8B",
    ),
    ("merges without saying where to", "lora merge --lora_weights lora-old", "--output_dir"),
    ("exports over a folder", "lora export --base_model TINY --output_dir empty", "not empty"),
    ("converts over a folder", "model convert TINY empty", "not empty"),
    ("looks into a folder that is not there", "model info models/a", "models/a"),
    ("misspells the file of data", "train --data_path my.json", "my.json"),
    ("gives a folder as data", "train --data_path empty", "empty is no"),
    (
        "misspells the file of questions",
        "generate --base_model TINY --instruct_dir q",
        "q not found",
    ),
    ("trains into an older run", "train --output_dir lora-old", "--overwrite"),
    ("resumes from what is no checkpoint", "train --resume_from_checkpoint empty", "empty"),
    ("gives a file as output_dir", "train --output_dir ok.json", "ok.json"),
    ("gives an empty output_dir", "train --output_dir ''", "output_dir"),
    # files, keys, encodings
    ("data with other keys", "train --data_path keys.json", "标题, 正文"),
    ("JSON with single quotes", "train --data_path broken.jsonl", "line 2"),
    ("JSON that was cut off", "train --data_path cut.json", "array"),
    ("an empty file", "train --data_path empty.json", "empty.json"),
    ("a record without an answer", "train --data_path no_answer.json", "record 2"),
    ("two questions in a row", "train --data_path roles.json", "in turn"),
    ("a table saved by Excel in China", "train --data_path gbk.csv", "GBK"),
    ("a table as Unicode text", "train --data_path utf16.csv", "UTF-16"),
    ("the workbook itself", "train --data_path book.xlsx", "Excel"),
    ("a Parquet file of a hub", "train --data_path rows.parquet", "Parquet"),
    ("a comma inside a cell", "train --data_path commas.csv", "line 2"),
    ("a table of which only the header is there", "train --data_path header.csv", "header.csv"),
    ("questions as training data", "train --data_path questions.txt", "line 1"),
    ("weight 0 of a file", "train --data_path ok.json:0", "weight 0"),
    ("all data as validation", "train --data_path ok.json --val_set_size 3", "val_set_size 3"),
    ("a template that is not there", "train --prompt_template_name mine", "mine.json"),
    (
        "a template of other fields",
        "generate --use_lora False --prompt_template template.json 问",
        "instruction",
    ),
    ("a cut-off shorter than any prompt", "train --cutoff_len 4", "cutoff_len 4"),
    # options
    ("misspells an option", "generate --temprature 0.7 问", "--temperature"),
    ("misspells an option of a command", "build_data knowledge --modle m", "--model"),
    ("forgets the quotes", "generate what does 黄芪 do", "quotes"),
    ("gives a word for a number", "train --batch_size many", "many"),
    ("writes a number with a comma", "train --learning_rate 3,0", "3,0"),
    ("gives no value", "train --base_model", "--base_model"),
    ("asks for rank 0", "train --lora_r 0", "lora_r"),
    ("misspells a linear", "train --lora_target_modules qproj", "q_proj"),
    ("asks for another dtype", "train --dtype fp8", "fp8"),
    ("asks for another storage", "generate --base_model TINY --base_dtype int4 问", "int4"),
    ("has a Mac", "generate --base_model TINY --device mps 问", "mps"),
    ("has fewer cards", "train --device cuda:99", "cuda:99"),
    ("trains all of a quantised base", "train --full --base_dtype int8", "--full"),
    ("shards without torchrun", "train --shard", "torchrun"),
    ("asks an empty question", "generate ''", "empty"),
    ("asks and serves", "generate 问 --serve", "one of"),
    ("saves a single answer", "generate --output a.jsonl 问", "--output"),
    ("gives a share above 1", "generate --top_p 2 问", "top_p"),
    ("leaves no room to answer", "generate --context 100", "context 100"),
    ("opens the server to all", "generate --serve --host 0.0.0.0", "--api_key"),
    ("a port in use", "generate --base_model TINY --serve --port PORT", "another --port"),
    ("names no command", "build_data", "required"),
    ("names another command", "build_data judge", "judge"),
    # building data
    ("names no model", "build_data knowledge --output o.jsonl", "--model"),
    ("has no key", "build_data knowledge --model m --output o.jsonl", "OPENAI_API_KEY"),
    ("misspells the knowledge base", "build_data offline --knowledge kb.json", "kb.json"),
    ("a triple of two", "build_data offline --knowledge triples.csv", "line 2"),
    ("a value that is no list", "build_data offline --knowledge entities.jsonl", "line 1"),
    (
        "a form that is not there",
        "build_data knowledge --model m --output o.jsonl --dry_run --mix simple=1",
        "simple=1",
    ),
    (
        "a folder without prompts",
        "build_data knowledge --model m --output o.jsonl --dry_run --prompts empty",
        "no prompts",
    ),
    (
        "a limit without prices",
        "build_data knowledge --dry_run --max_cost 3",
        "--price_in",
    ),
    (
        "an output that is something else",
        "build_data knowledge --model m --output theirs.jsonl --dry_run",
        "theirs.jsonl",
    ),
    ("extracts from nothing", "build_data extract --model m --output o.jsonl", "--texts"),
    ("counts a file that is not there", "build_data stats records.jsonl", "records.jsonl"),
]


def write_files(folder):
    """Write FILES into a folder."""
    for name, content in FILES.items():
        path = Path(folder, name)
        path.parent.mkdir(exist_ok=True)
        if not isinstance(content, str | bytes):
            content = json.dumps(content, ensure_ascii=False)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def make(line, port):
    """(exit code, what was said on stderr) of a command line, run in this process and folder."""
    words = [{"TINY": str(TINY), "PORT": str(port)}.get(w, w) for w in shlex.split(line)]
    script, *sys.argv[1:] = words
    sys.argv[0], said, code = f"{script}.py", io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            model.run(MAINS[script])
        except SystemExit as stop:
            code = stop.code or 0
    return code, said.getvalue()


@contextlib.contextmanager
def folder_of_files():
    """Within it the working folder holds FILES, a port is in use, and there is no API key; yields
    the port."""
    import socket

    before, argv, kept = os.getcwd(), list(sys.argv), dict(os.environ)
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as busy:
        write_files(folder)
        os.chdir(folder)
        for name in ("OPENAI_API_KEY", "API_HOST", "API_PORT", "API_KEY"):
            os.environ.pop(name, None)
        # The caches of the hubs of whoever runs this may hold what the mistakes name.
        os.environ |= {"HF_HUB_CACHE": "no-cache", "MODELSCOPE_CACHE": "no-cache"}
        try:
            yield busy.getsockname()[1]
        finally:
            os.chdir(before)
            sys.argv[:] = argv
            os.environ.clear()
            os.environ.update(kept)


def main():
    print("| mistake | exit code | sentence |\n|---|---|---|")
    with folder_of_files() as port:
        for what, line, _ in MISTAKES:
            code, said = make(line, port)
            sentence = said.strip().split("\n")[-1].replace("|", "\\|").replace(f"{ROOT}/", "")
            print(f"| {what}: `{line}` | {code} | {sentence} |", flush=True)


if __name__ == "__main__":
    main()
