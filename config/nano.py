# The nano pair on two CPU cores: a drafter of four layers for the shipped target of twelve.
# About seven minutes. data/nano/readme.md has the trials behind these values.
target = "data/nano/target"
data = "data/nano"
out_dir = "out/nano-dflash"
# the drafter
num_layers = 4                      # of twelve: a draft must cost far less than a target forward
num_heads = 4
num_kv_heads = 2
head_dim = 32
intermediate_size = 384
initializer_range = 0.06            # about 1 / sqrt(width), like 0.02 at 1,024 channels
target_layer_ids = (3, 7, 10)       # two full-attention layers, and the second to last layer,
                                    # because transformers applies the final norm to the last
# the loss
num_anchors = 12
weighting = "dpace"                 # slightly better than decay for all three seeds
# optimization
batch_size = 8                      # many small steps work better than few large ones
grad_accum_steps = 1
max_length = 256
pad_to_multiple_of = 16             # little padding; nothing is compiled, so many lengths are fine
bucket_size = 1                     # batches of mixed lengths, because samples of one length are
                                    # one kind of problem here, and such batches work worse
epochs = 1.2
optimizer = "muon"                  # better than AdamW in the trials
lr = 3e-3                           # small models need large steps
log_every = 20
save_every = 250
