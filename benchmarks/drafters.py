"""
Drafters for measurement: an oracle, which knows the answer and is right as often as one wishes,
and an untrained drafter, which costs what a trained one costs.
"""
import torch

from checkpoint import drafter_config, prepare_decoding
from model import DFlashDraftModel

CERTAIN = 1e9  # a logit so large that no noise changes the choice


class Oracle:
    """Replays known answers to prompts, each guess wrong with probability 1 - p.

    So tau is 1 + p + p^2 + .. + p^(K-1) for every target. A drafter that is given along is run and
    its guesses are overruled: then a round costs what it costs with that drafter.

    prompts     how many answers it knows at a time; `learn` tells it one of them. It is not told
                which sequence is in which place, so it looks the anchor up: the first answer with
                this token at this position is replayed. Where two answers share it, the guesses
                may be the other one's, and are right or wrong by luck.
    """

    def __init__(self, target, drafter=None, block_size=16, prompts=1):
        device = target.embed_tokens.weight.device
        self.block_size = block_size
        self.drafter = drafter
        self.target_layer_ids = drafter.target_layer_ids if drafter else ()
        self.vocab_size = target.config.vocab_size
        length = target.config.max_position_embeddings
        # by absolute position: the answers, and what is guessed there
        self.tokens = torch.zeros(prompts, length, dtype=torch.long, device=device)
        self.guesses = torch.zeros_like(self.tokens)
        self.slots = torch.arange(1, block_size, device=device)

    def learn(self, prompt_ids, answer, p, number=0):
        """The answer to prompt `number`, whose tokens are to be guessed right with probability p
        each."""
        answer = torch.tensor(answer)
        generator = torch.Generator().manual_seed(len(prompt_ids))
        wrong = torch.rand(len(answer), generator=generator) >= p
        start = len(prompt_ids)
        guesses = torch.where(wrong, (answer + 1) % self.vocab_size, answer)
        self.tokens[number, start:start + len(answer)] = answer
        self.guesses[number, start:start + len(answer)] = guesses

    # what a Decoder asks of a drafter

    def new_cache(self, batch, length):
        if self.drafter:
            return self.drafter.new_cache(batch, length)
        return []  # of no layer

    def write_context(self, features, cache, position):
        if self.drafter:
            self.drafter.write_context(features, cache, position)

    def draft_logits(self, anchor, target, cache, position):
        """Logits (B, K-1, V) whose largest are those of the known guesses."""
        if self.drafter:
            logits = self.drafter.draft_logits(anchor, target, cache, position)
        else:
            shape = (len(anchor), self.block_size - 1, self.vocab_size)
            logits = torch.zeros(shape, device=anchor.device)
        is_its_own = self.tokens[:, position] == anchor                      # (prompts, B)
        number = is_its_own.long().argmax(0)                                 # (B,); the first one
        guesses = self.guesses[number[:, None], position[:, None] + self.slots]  # (B, K-1)
        return logits.scatter_(-1, guesses[:, :, None], CERTAIN)


def probability_for(tau, block_size):
    """The p for which an Oracle's rounds are tau tokens long on average, by bisection."""
    low = 0.0
    high = 1.0
    for _ in range(50):
        p = (low + high) / 2
        expected = sum(p ** k for k in range(block_size))
        if expected < tau:
            low = p
        else:
            high = p
    return high


def random_drafter(target):
    """An untrained drafter that decodes: it costs what a trained one costs."""
    drafter = untrained_drafter(target).to(target.embed_tokens.weight.dtype)
    return prepare_decoding(drafter.requires_grad_(False).eval())


def untrained_drafter(target):
    """A new drafter for a target: five layers of the target's own widths that read the outputs of
    its full-attention layers. For Qwen3.5-0.8B that is the shape of Phase 1.2's drafter."""
    c = target.config
    readable = range(c.num_hidden_layers - 1)  # the last layer's output is never a feature
    target_layer_ids = [i for i in readable if c.layer_types[i] == "full_attention"]
    if not target_layer_ids:
        target_layer_ids = [c.num_hidden_layers - 2]
    torch.manual_seed(0)
    drafter = DFlashDraftModel(drafter_config(
        c, layers=5, target_layer_ids=target_layer_ids, mask_token_id=c.vocab_size - 1,
        heads=c.num_attention_heads, kv_heads=c.num_key_value_heads, head_dim=c.head_dim,
        mlp=c.intermediate_size))
    return drafter.to(target.embed_tokens.weight.device)
