# The nano pair on two CPU cores: a drafter of three layers for the shipped target of twelve.
# About seven minutes.
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
batch_size = 8                      # many small steps are worth more than large ones
accumulation = 1
max_length = 256
length_multiple = 16                # two thirds of a step are the target's, and grow with padding
sort_window = 4                     # a third less padding than 1; with 64 all samples of a batch
                                    # would be problems of one kind, which costs much tau
epochs = 1.34                       # 2,010 steps
lr = 1.4e-3                         # small models like large steps
eval_every = 250
log_every = 20
save_every = 250
