# A drafter for Qwen3.5-4B: 32 layers, hidden 2560, MLP 9216, tied head. It has the layers, heads,
# and target layers of the published drafter (z-lab/Qwen3.5-4B-DFlash), whose first five layers have
# a sliding window of 4096. Here all layers see everything. Its data is made like the 2B's.
#
# Parameters: 6 layers of 96,998,656 (attention 26,214,400, MLP 70,778,880, norms 5,376),
# fc 8 x 2560 x 2560, two norms of 2,560: 634,425,856.
target = "Qwen/Qwen3.5-4B"
data = "data/math4b"
out_dir = "out/qwen3_5_4b-dflash"
num_layers = 6
num_heads = 32
num_kv_heads = 8
head_dim = 128
intermediate_size = 9216
target_layer_ids = (1, 5, 9, 13, 17, 21, 25, 29)
