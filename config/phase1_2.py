# Phase 1.2: the published drafter of Qwen3.5-0.8B (Moonlight556/Qwen3.5-0.8B-DFlash).
# One GPU, hours. These values are train.py's defaults, written out. Only compile differs on a GPU.
#
# Steps: 512 of 239,467 samples are held out, and 238,955 are trained on. A step is 2 samples x
# 2 micro-batches = 4 samples, at most 4 x 3072 = 12,288 tokens. An epoch is 59,738 steps and at
# most 734 M tokens. Warm-up is 4 % of the steps, 2,390.
#
# Parameters: 5 layers of 16,255,488 (attention 5,242,880, MLP 11,010,048, norms 2,560),
# fc 5 x 1024 x 1024 = 5,242,880, two norms of 1,024: 86,522,368, in 3 + 11 x 5 = 58 tensors.
import torch

target = "Qwen/Qwen3.5-0.8B"                # 24 layers; frozen weights, in bfloat16 on a GPU
data = "data/math240k"                      # its own answers, thinking off
out_dir = "out/phase1_2-dflash"
compile = torch.cuda.is_available()         # takes a minute at the start of a run of hours
# the drafter
num_layers = 5
num_heads = 8
num_kv_heads = 2
head_dim = 256
intermediate_size = 3584
target_layer_ids = (3, 7, 11, 15, 19)       # full-attention layers except 23, the last one
block_size = 16
mask_token_id = None                        # the first id after the tokenizer: 248077
# the loss
num_anchors = 512
gamma = 7.0
# optimization: AdamW with float32 weights, bfloat16 matmuls on a GPU
batch_size = 2
grad_accum_steps = 2
max_length = 3072
epochs = 1.0
lr = 3e-4
warmup = 0.04
betas = (0.9, 0.999)
weight_decay = 0.0
grad_clip = 1.0
