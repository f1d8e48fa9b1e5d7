# the nano pair on two CPU cores: a drafter of three layers for the shipped target of twelve, about eleven minutes
target = "data/nano/target"
data = "data/nano"
out_dir = "out/nano-dflash"
layers = 3                  # of twelve: a guess must cost far less than what it may save
heads, kv_heads, head_dim = 4, 2, 32
mlp = 384
taps = (3, 7, 10)           # the full-attention layers that may be tapped, and the last layer that may
anchors = 24                # an answer has about 60 tokens to begin a block at
batch_size = 16
accumulation = 1
max_length = 256
length_step = 64
epochs = 2.5
lr = 2e-3                   # small models like large steps
eval_every = 100
log_every = 20
save_every = 250
