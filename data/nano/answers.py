"""Lets a target answer many questions at once: prompts of one length go through in lockstep, one row a step."""
import torch


@torch.no_grad()
def answer(target, tokenizer, questions, limit=160, batch=256):
    """Greedy answers of the target, [(prompt ids, answer ids)] in the order of the questions. An answer ends with
    <|im_end|>, or without it after `limit` tokens. Prompts are grouped by length, so that a group shares a position.
    """
    device, stop = target.embed_tokens.weight.device, tokenizer.eos_token_id
    prompts = tokenizer.apply_chat_template([[{"role": "user", "content": q}] for q in questions], tokenize=False,
                                            add_generation_prompt=True, enable_thinking=False)
    prompts = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [None] * len(prompts)
    while order:
        n = len(prompts[order[0]])
        group = [i for i in order[:batch] if len(prompts[i]) == n]
        order = order[len(group):]
        tokens = torch.tensor([prompts[i] for i in group], device=device)
        state, _, logits = target.prefill(tokens, n + limit + 1, rows=1)
        out = [logits.argmax(-1)]
        while len(out) < limit and not all_stopped(out, stop):
            _, logits = target(out[-1][:, None], state, rows=slice(None))
            state.commit(1)
            out.append(logits[:, 0].argmax(-1))
        for i, ids in zip(group, torch.stack(out, 1).tolist()):
            answers[i] = (prompts[i], ids[:ids.index(stop) + 1] if stop in ids else ids)
    return answers


def all_stopped(out, stop):
    """Whether every row of a list of steps holds the stop id; asked of the device every 16th step only."""
    return len(out) % 16 == 0 and bool((torch.stack(out) == stop).any(0).all())
