# A drafter for Qwen3.5-4B: 32 layers, hidden 2560, MLP 9216, tied head. Layers, heads and taps are those of the
# published one (z-lab/Qwen3.5-4B-DFlash), whose first five layers have a sliding window of 4096; here all see all.
#
# Its data is what this target says. With a server of it running:
#   python data/regenerate.py --prompts=Moonlight556/qwen3.5-0.8b-target-matched-math-240k \
#       --out=data/math4b/rows.jsonl --server=http://localhost:30000/v1 --model=Qwen/Qwen3.5-4B
#   python data/math240k/prepare.py --source=data/math4b/rows.jsonl --target=Qwen/Qwen3.5-4B \
#       --out_dir=data/math4b
# Parameters: 6 layers of 96,998,656 (attention 26,214,400, MLP 70,778,880, norms 5,376), fc 8 x 2560 x 2560,
# two norms of 2,560: 634,425,856.
target = "Qwen/Qwen3.5-4B"
data = "data/math4b"
out_dir = "out/qwen3_5_4b-dflash"
layers = 6
heads, kv_heads, head_dim = 32, 8, 128
mlp = 9216
taps = (1, 5, 9, 13, 17, 21, 25, 29)
