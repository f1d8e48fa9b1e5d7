# The nano pair on two CPU cores: a drafter of four layers for the shipped target of twelve.
# Six and a half minutes. The trials behind these values stand in data/nano/readme.md.
target = "data/nano/target"
data = "data/nano"
out_dir = "out/nano-dflash"
# the drafter
num_layers = 4                      # of twelve: a guess must cost far less than what it may save
num_heads = 4
num_kv_heads = 2
head_dim = 32
intermediate_size = 384
initializer_range = 0.06            # as 0.02 at a width of 1,024: about 1 / sqrt(width)
target_layer_ids = (3, 7, 10)       # two full-attention layers, and the last layer but one:
                                    # transformers returns the last one normed
# the loss
num_anchors = 12
weighting = "dpace"                 # a little better than the decay for each of three seeds
# optimisation
batch_size = 8                      # many small steps do more than few large ones
grad_accum_steps = 1
max_length = 256
pad_to_multiple_of = 16                # little padding; nothing is compiled, so shapes may be many
bucket_size = 1                     # batches of mixed lengths: samples of one length are one kind
                                    # of problem here, and batches of them do worse
epochs = 1.2
optimizer = "muon"                  # in trials of 2,100 steps tau 9.6 to 9.7, with AdamW 8.4
lr = 3e-3                           # small models like large steps
log_every = 20
save_every = 250
