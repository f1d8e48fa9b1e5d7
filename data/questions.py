"""
The text after a math question that asks for a boxed answer. The published Math500 figures were
measured with this suffix.
"""
SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
