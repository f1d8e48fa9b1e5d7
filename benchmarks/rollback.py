"""
Three ways to roll back rejected guesses, in rounds of the target alone with blocks of K tokens:

    snapshots   run the delta rule token by token, keep S after each one, restore the right one
    replay      wait for the number of accepted tokens, and run these again in a second forward
    commit      ours (decode_state.py): keep S at a multiple of K tokens, and the inputs since then

In keys, values, and the convolution, later tokens overwrite rejected ones, so they do not count in
mb_per_sequence. A round accepts ACCEPTED guesses. We compare two runs over one text. One commits 1
token per forward, like the target alone, and the other commits 1 + ACCEPTED. The table has the
fraction of tokens with bitwise equal logits, and with the same most likely next token.
"""
from functools import partial

import torch

from benchmarks.common import load, print_table
from benchmarks.timing import median_seconds, seconds_of
from decode_state import DecodeState, LinearLayerState
from delta_rule import delta_step, gated_delta_rule
from fast.cuda_graph import Graphs

ACCEPTED = 5


@torch.inference_mode()
def run(config):
    workload = load(config, default_count=1)
    text = torch.tensor(workload.prompts[0].ids[:96], device=config.device)
    rows = []
    timed = {}
    for slots in config.slots or (1, 8):
        for way in ("snapshots", "replay", "commit"):
            alone = Rounds(workload, slots, way, 1).logits_of(text)
            rounds = Rounds(workload, slots, way, 1 + ACCEPTED)
            logits = rounds.logits_of(text)
            kept = rounds.state.S.nbytes + rounds.state.delta_inputs.nbytes
            rows.append({
                "sequences": slots, "way": way, "mb_per_sequence": kept / 1e6 / slots,
                "syncs_before_commit": int(way == "replay"),
                "equal_logits": (logits == alone).all(-1).double().mean().item(),
                "equal_choices": (logits.argmax(-1) == alone.argmax(-1)).double().mean().item()})
            timed[slots, way] = partial(seconds_of, rounds.run, 16)
    seconds = median_seconds(timed)
    for row in rows:
        row["ms_per_round"] = 1000 * seconds[row["sequences"], row["way"]]
    print_table(rows, rows[0])
    return {"accepted": ACCEPTED, "rows": rows}


class Rounds:
    """Rounds of B sequences that all commit n tokens, fewer than K."""
    def __init__(self, workload, slots, way, n):
        K = workload.drafter.block_size
        self.way = way
        self.target = workload.target
        self.state = OtherState(self.target, slots, 1024, K)
        layers = {"snapshots": (SnapshotLayer, 1 + K), "replay": (ReplayLayer, 1)}
        if way in layers:
            self.state.change_layers(*layers[way])
        self.n = torch.full_like(self.state.position, n)                     # (B,)
        self.block = self.n.new_zeros(slots, K)
        self.accepted = self.block[:, :n]
        self.graphs = Graphs(self.n.device)

    def run(self):
        logits = self.graphs.run("verify", self.verify)
        logits.argmax(-1).tolist()  # waits for the device; n follows from these choices
        if self.way == "replay":
            self.graphs.run("replay", self.replay)

    def verify(self):
        """Logits (B, K, V) of a block. Commits n tokens, unless that takes a second forward."""
        _, hidden = self.target(self.block, self.state)
        if self.way == "snapshots":
            self.state.S[:, 0] = self.state.S[:, self.n, self.state.sequences]
        if self.way != "replay":
            self.state.commit(self.n)
        return self.target.logits(hidden)

    def replay(self):
        self.target(self.accepted, self.state)
        self.state.commit(self.n)

    def logits_of(self, text):
        """Logits (B, T, V) after each token of a text (T,). Guesses after n tokens are token 0."""
        logits = []
        for known in text.split(self.accepted.shape[1]):
            self.block[:, :len(known)] = known
            logits.append(self.verify()[:, :len(known)].clone())
            if self.way == "replay":
                self.replay()
        return torch.cat(logits, 1)


class OtherState(DecodeState):
    def change_layers(self, linear_layer, places):  # S of committed tokens is in place 0
        self.S = self.S[:, :1].repeat(1, places, 1, 1, 1, 1)
        self.delta_inputs = self.delta_inputs.new_zeros(0)
        layers = [layer for layer in self.layers if isinstance(layer, LinearLayerState)]
        for layer, S in zip(layers, self.S):
            layer.__class__ = linear_layer
            layer.S = S

    def begin_forward(self, T, segment=None):
        K = self.tokens_per_forward
        self.tokens_per_forward = T  # a replay is shorter than a block
        super().begin_forward(T, segment)
        self.tokens_per_forward = K


class SnapshotLayer(LinearLayerState):
    def delta_rule(self, *inputs):
        S = self.S[0]
        outputs = []
        for t, token in enumerate(zip(*[x.split(1, 1) for x in inputs]), 1):
            o, S = delta_step(*token, S=S)
            outputs.append(o)
            self.S[t] = S
        return torch.cat(outputs, 1).to(inputs[0].dtype)


class ReplayLayer(LinearLayerState):
    def delta_rule(self, *inputs):
        K = self.state.tokens_per_forward
        o, S = gated_delta_rule(*[x.to(self.S.dtype) for x in inputs], S=self.S[0], chunk=K)
        if inputs[0].shape[1] < K:  # a replay
            self.S[0] = S
        return o.to(inputs[0].dtype)
