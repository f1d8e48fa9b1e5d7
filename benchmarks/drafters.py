"""
Drafters for measurement: an oracle that knows the answer, with guesses that are right with a given
probability, and an untrained drafter, which costs the same time as a trained one.
"""
import torch

from checkpoint import drafter_config
from model import DFlashDraftModel

CERTAIN = 1e9  # a logit so large that no noise changes the choice


class Oracle:
    """Replays known answers to prompts. Each guess is right with probability p, so tau is 1 + p +
    p^2 + .. + p^(K-1), whatever the target is.

    prompts: how many answers it knows. It does not know which sequence is in which slot, so it
    replays the first answer that has the anchor at this position, which can be the wrong one.
    """
    target_layer_ids = ()

    def __init__(self, target, block_size=16, prompts=1):
        device = target.embed_tokens.weight.device
        self.block_size = block_size
        self.vocab_size = target.config.vocab_size
        length = target.config.max_position_embeddings
        # by absolute position: the answers and the guesses
        self.tokens = torch.zeros(prompts, length, dtype=torch.long, device=device)
        self.guesses = torch.zeros_like(self.tokens)
        self.offsets = torch.arange(1, block_size, device=device)

    def learn(self, prompt_ids, answer, p, number=0):
        """Learn the answer to prompt `number`; each of its tokens is guessed right with
        probability p."""
        answer = torch.tensor(answer)
        generator = torch.Generator().manual_seed(len(prompt_ids))
        wrong = torch.rand(len(answer), generator=generator) >= p
        start = len(prompt_ids)
        guesses = torch.where(wrong, (answer + 1) % self.vocab_size, answer)
        self.tokens[number, start:start + len(answer)] = answer
        self.guesses[number, start:start + len(answer)] = guesses

    def new_cache(self, batch, length):
        return []

    def write_context(self, features, cache, position):
        pass

    def draft_logits(self, anchor, target, cache, position):
        """Logits (B, K-1, V), the largest at the known guesses."""
        shape = (len(anchor), self.block_size - 1, self.vocab_size)
        logits = torch.zeros(shape, device=anchor.device)
        is_its_own = self.tokens[:, position] == anchor                      # (prompts, B)
        number = is_its_own.long().argmax(0)                                 # (B,); the first one
        guesses = self.guesses[number[:, None], position[:, None] + self.offsets]  # (B, K-1)
        return logits.scatter_(-1, guesses[:, :, None], CERTAIN)


def random_drafter(target, block_size=16):
    """An untrained drafter for a target: five layers with the target's widths. Its features are the
    outputs of the full-attention layers. For Qwen3.5-0.8B this is the shape of Phase 1.2's
    drafter."""
    c = target.config
    readable = range(c.num_hidden_layers - 1)  # the last layer's output is never a feature
    target_layer_ids = [i for i in readable if c.layer_types[i] == "full_attention"]
    if not target_layer_ids:
        target_layer_ids = [c.num_hidden_layers - 2]
    torch.manual_seed(0)
    drafter = DFlashDraftModel(drafter_config(
        c, num_hidden_layers=5, target_layer_ids=target_layer_ids, mask_token_id=c.vocab_size - 1,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim, intermediate_size=c.intermediate_size, block_size=block_size))
    weight = target.embed_tokens.weight
    return drafter.to(weight.device, weight.dtype).requires_grad_(False).eval()
