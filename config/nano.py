# The nano pair on two CPU cores: a drafter of three layers for the shipped target of twelve.
# About twelve minutes.
target = "data/nano/target"
data = "data/nano"
out_dir = "out/nano-dflash"
# the drafter
num_layers = 3                      # of twelve: a guess must cost far less than what it may save
num_heads = 4
num_kv_heads = 2
head_dim = 32
intermediate_size = 384
target_layer_ids = (3, 7, 10)       # two full-attention layers, and the last layer but one:
                                    # transformers returns the last one normed
# the loss
num_anchors = 12
# optimisation
batch_size = 8                      # many small steps; in the same time, 16 samples of 24 anchors
                                    # gave a tau of 8.5 in place of 9.7
accumulation = 1
max_length = 256
length_multiple = 64
sort_window = 1                     # batches of mixed lengths: samples of one length are one kind
                                    # of problem here, and batches of them gave 6.2 in place of 8.5
epochs = 3.5
lr = 1.4e-3                         # small models like large steps
eval_every = 100
log_every = 20
save_every = 250
