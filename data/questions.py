"""
What is written after a question of mathematics, so that its answer can be found in the text.

The published figures of Math500 were measured with this suffix. Another one makes other figures.
"""
SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
