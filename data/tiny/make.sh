#!/usr/bin/env bash
# How the small base came about: run from the top of the repository; PYTHON names the interpreter.
# About 25 minutes on 2 quiet cores. It writes build/ (ignored by git) and then the files beside this script.
set -euo pipefail
PYTHON=${PYTHON:-python}
here=data/tiny; build=$here/build; mkdir -p $build
$PYTHON $here/make.py documents $build/documents.jsonl 34 4
$PYTHON $here/make.py tokenizer $build/tokenizer.model 4352
cat > $build/config.json <<'JSON'
{"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
 "intermediate_size": 512, "vocab_size": 4352, "rms_norm_eps": 1e-05}
JSON
$PYTHON model.py init $build/config.json $build/fresh --seed 0
cp $build/tokenizer.model $build/fresh/
$PYTHON $here/make.py copying $build/fresh $build/copying
cp $build/tokenizer.model $build/copying/
$PYTHON train.py --full --base_model $build/copying --data_path $build/documents.jsonl --output_dir $build/trained \
  --prompt_template_name bare --num_epochs 1 --batch_size 48 --micro_batch_size 48 --learning_rate 2e-3 \
  --val_set_size 0 --save_steps 0 --num_answers 0 --dtype bf16
$PYTHON - <<'PY'
import torch
from model import load_model, save_model
save_model(load_model("data/tiny/build/trained", dtype=torch.bfloat16), "data/tiny", "data/tiny/build/fresh")
PY
