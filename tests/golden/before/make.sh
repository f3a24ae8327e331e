#!/bin/bash
# make.sh OUT: the miniature; `tapir` is that of commit 328faa6
set -eu
out=$1
mkdir -p "$out" && cd "$out"
steps="--loop.batch 8 --loop.log-every 1 --loop.validation-samples 8"
small="$steps --order.lanes 4 --order.window 2 --optim.warmup 2 --supervisor.restarts 0"
exact="--engine.precision fp32 --engine.matmul-precision highest --profile.peak-tflops 0.1"
tapir pack shapes "$out/raw" --count 64 --pixels 16 --block 4 --shard-pairs 24 --validation 0.2
tapir train bpe tiny --data "$out/raw" --out "$out/bpe" --vocabulary 300
tapir train dvae tiny --data "$out/raw" --out "$out/dvae" $small $exact --loop.steps 6 \
    --loop.validate-every 3 --mesh.data 1 --checkpoint.every 3 --checkpoint.keep 1 \
    --model.pixels 16 --model.width 4 --model.codebook 16 --model.code-width 8
tapir tokenize "$out/raw" "$out/tokens" --dvae "$out/dvae" --bpe "$out/bpe" --block 4 --variants 2
prior="$small $exact --data $out/tokens --loop.steps 8 --loop.validate-every 2 --checkpoint.every 4
    --checkpoint.keep 1 --mesh.data 2 --engine.accumulate 2 --compress.rank 2
    --compress.warm-start --optim.ema 0.9 --optim.ema-every 2 --caption-drop 0.25
    --model.dim 16 --model.heads 2 --model.layers 2 --model.text-length 8 --model.conv-kernel 3"
tapir train prior tiny --out "$out/whole" $prior
tapir train prior tiny --out "$out/prior" $prior --loop.until 4
tapir train clip tiny --data "$out/raw" --out "$out/clip" --bpe "$out/bpe" $small $exact \
    --loop.steps 4 --loop.validate-every 2 --mesh.data 1 --checkpoint.every 4 --checkpoint.keep 1 \
    --model.pixels 16 --model.patch 8 --model.dim 16 --model.heads 2 --model.layers 1 \
    --model.text-length 8
tapir evaluate "$out/raw" --out "$out/samples" --prior "$out/whole" --dvae "$out/dvae" \
    --clip "$out/clip" --bpe "$out/bpe" --prompts 4 --candidates 2 --most 4 --few 2 --guided 2
   
tapir export "$out/dvae" "$out/hub" --bpe "$out/bpe"
tapir sample "a small red circle" --out "$out/sample.png" --prior "$out/whole" --dvae "$out/dvae" \
    --clip "$out/clip" --bpe "$out/bpe" --candidates 4 --show 4
