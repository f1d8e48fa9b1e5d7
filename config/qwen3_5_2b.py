# A drafter for Qwen3.5-2B: 24 layers, hidden 2048, MLP 6144, tied head. Phase 1.2's recipe and
# depths, wider. Its data is this target's own answers, not the 0.8B's: data/regenerate.py with
# --target=Qwen/Qwen3.5-2B, then data/conversations.py with --out_dir=data/math2b.
#
# Parameters: 5 layers of 48,239,104 (attention 10,485,760, MLP 37,748,736, norms 4,608),
# fc 5 x 2048 x 2048, two norms of 2,048: 262,171,136.
target = "Qwen/Qwen3.5-2B"
data = "data/math2b"
out_dir = "out/qwen3_5_2b-dflash"
intermediate_size = 6144                    # all else is Phase 1.2's
