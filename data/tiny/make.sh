#!/usr/bin/env bash
# How the small base came about: run from the top of the repository; PYTHON names the interpreter.
# About six hours on two cores. It writes build/ (ignored by git) and then the files
# beside this script. talk.json and make.py grew between the stages: what comes out now is like it,
# not the same.
set -euo pipefail
PYTHON=${PYTHON:-python}
here=data/tiny; build=$here/build; mkdir -p $build
$PYTHON $here/make.py tokenizer $build 4352
cat > $build/config.json <<'JSON'
{"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
 "intermediate_size": 512, "vocab_size": 4352, "rms_norm_eps": 1e-05,
 "description": "The base has read what data/knowledge.jsonl holds on 739 diseases, herbs, formulas and drugs, and nothing else; it may invent. 底座只读过知识库的 739 个条目，别的不知道，仍可能编造。"}
JSON
$PYTHON model.py init $build/config.json $build/fresh --seed 0
cp $build/tokenizer.model $build/tokenizer_config.json $build/config.json $build/fresh/
$PYTHON $here/make.py copying $build/fresh $build/base
cp $build/tokenizer.model $build/tokenizer_config.json $build/config.json $build/base/
# How to read and to answer, then above all facts, then more of both: PASSES of all passages,
# EXERCISES, SEED, RATE.
while read -r passes exercises seed rate; do
  $PYTHON $here/make.py documents $build/documents.jsonl $passes $exercises $seed
  $PYTHON train.py --full --base_model $build/base --data_path $build/documents.jsonl --output_dir $build/trained --overwrite True \
    --prompt_template_name bare --num_epochs 1 --batch_size 48 --micro_batch_size 48 --learning_rate $rate \
    --val_set_size 0 --save_steps 0 --num_answers 0 --dtype bf16
  rm -r $build/base && mv $build/trained $build/base
done <<'STAGES'
34 4 0 2e-3
26 1 1 1.5e-3
40 2 2 1.5e-3
12 2 3 1e-3
14 1 4 1e-3
18 6 5 1.5e-3
12 2 6 8e-4
40 1 7 1e-3
8 3 8 7e-4
8 1 9 7e-4
8 1 10 6e-4
6 2 11 6e-4
STAGES
$PYTHON - <<'PY'
import torch
from model import load_model, save_model
save_model(load_model("data/tiny/build/base", dtype=torch.bfloat16), "data/tiny", "data/tiny/build/fresh")
PY
