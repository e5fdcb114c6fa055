#!/usr/bin/env bash
# The whole way on a laptop: write a corpus, pre-train a small RWKV on some skills, fine-tune it
# with Bone on a new one, merge, and see what it can do before and after. No GPU, no download of
# weights or data. Everything lands in out/quickstart. An RWKV-6, or with --generation 7 an RWKV-7.
set -euo pipefail
case "$*" in
"") generation=6 ;;
"--generation 6" | "--generation 7") generation=$2 ;;
*) echo "usage: quickstart.sh [--generation 6|7]" >&2; exit 2 ;;
esac
source "$(dirname "$0")/setup.sh" requirements.txt

out=out/quickstart
rm -rf "$out"
mkdir -p "$out"
evaluate=(python scripts/evaluate.py --task exact --data "$out/new/test.jsonl" --template chat
    --tokens 64)

echo; echo "1. Write problems of three old skills and of a new one that combines them"
python scripts/make_problems.py --skills add subtract total --train 40000 --output "$out/old"
python scripts/make_problems.py --skills two_steps --train 6000 --test 200 --output "$out/new"
python scripts/prepare_data.py --input "$out/old/train.jsonl" --output "$out/old/train" \
    --tokenizer bytes

echo; echo "2. Pre-train a small model on the old skills"
python scripts/init_model.py --n_layer 4 --n_embd 128 --vocab_size 256 --head_size_a 32 \
    --generation "$generation" --output "$out/init.pth"
python train.py --load_model "$out/init.pth" --proj_dir "$out/base" \
    --data_file "$out/old/train" --data_type binidx --dataload get --ctx_len 128 \
    --micro_bsz 32 --epoch_steps 250 --lr_init 3e-3 --lr_final 3e-4 --warmup_steps 20 --grad_cp 0

echo; echo "3. What it can do of the new skill"
"${evaluate[@]}" --model "$out/base/rwkv-0.pth" --output "$out/before"

echo; echo "4. Fine-tune it on the new skill with Bone"
python train.py --load_model "$out/base/rwkv-0.pth" --proj_dir "$out/bone" \
    --data_file "$out/new/train.jsonl" --data_type jsonl --loss_mask qa --ctx_len 160 \
    --peft bone --bone_r 32 --micro_bsz 32 --epoch_steps 200 --lr_init 8e-3 --lr_final 5e-4 \
    --warmup_steps 10 --grad_cp 0

echo; echo "5. Merge the adapter into plain weights, and look again"
python merge/merge_bone.py --base_model "$out/base/rwkv-0.pth" \
    --peft_checkpoint "$out/bone/rwkv-0.pth" --output "$out/merged.pth"
"${evaluate[@]}" --model "$out/merged.pth" --output "$out/after"
python scripts/generate.py --model "$out/merged.pth" --tokens 64 --temperature 0 \
    --prompt $'User: Ada has 5 apples, finds 3 more and eats 6. How many apples now?\n\nAssistant:'

echo
echo "Loss of the fine-tuning: $out/bone/loss.png"
echo "The merged model, plain weights for any RWKV runtime: $out/merged.pth"
