# Phase 1.2: the published drafter of Qwen3.5-0.8B (Moonlight556/Qwen3.5-0.8B-DFlash).
# One GPU, hours. The recipe is train.py's defaults; only compile differs on a GPU.
#
# Steps: 512 of 239,467 samples are held out, and 238,955 are trained on. A step is 2 samples x
# 2 micro-batches = 4 samples, at most 4 x 3072 = 12,288 tokens. An epoch is 59,738 steps and at
# most 734 M tokens. Warm-up is 4 % of the steps, 2,390.
#
# Parameters: 5 layers of 16,255,488 (attention 5,242,880, MLP 11,010,048, norms 2,560),
# fc 5 x 1024 x 1024 = 5,242,880, two norms of 1,024: 86,522,368, in 3 + 11 x 5 = 58 tensors.
# They read the full-attention layers except 23, the last one. The mask has id 248077.
import torch

target = "Qwen/Qwen3.5-0.8B"                # 24 layers; frozen weights, in bfloat16 on a GPU
data = "data/math240k"                      # its own answers, thinking off
out_dir = "out/phase1_2-dflash"
compile = torch.cuda.is_available()         # takes a minute at the start of a run of hours
