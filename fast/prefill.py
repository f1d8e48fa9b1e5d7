"""
Prefills the prompts of a Decoder, on a GPU several at once.

A GPU takes much less time for eight short prompts together than for one after the other. So short
prompts are prefilled together, in a separate DecodeState with a few rows, and then copied into
their slots.

The bits of a prompt must not depend on the prompts that happen to wait with it. Therefore all
shapes follow from the prompt's own length and the number of slots. Prompts with segments of the
same length share a *reader*, whose number of rows never changes. Unused rows are padding.

    segment      256   512   1024   2048 tokens
    rows           8     4      2      1, but not more than there are slots

A CPU gains nothing from this. It prefills one prompt at a time, without padding.
"""
from typing import NamedTuple

import torch

from decode_state import DecodeState, prefill

SHORTEST_SEGMENT = 256


class Reader(NamedTuple):
    """Where prompts with segments of one length are prefilled."""
    state: DecodeState
    cache: list | None      # of the drafter


class Prefill:
    """Prefills prompts into the slots of a Decoder, its state and its drafter's cache."""

    def __init__(self, decoder):
        self.decoder = decoder
        self.readers = {}   # by length of segments

    def run(self, prompts):
        """Prefill prompts {slot: token ids}.

        Yields (slots, logits of the last tokens (slots, V)) for prompts that ran together.
        """
        by_length = {}
        for slot, prompt in prompts.items():
            length = self.segment_length(len(prompt))
            by_length.setdefault(length, []).append(slot)
        for length, slots in by_length.items():
            if length not in self.readers:
                self.readers[length] = self.new_reader(length)
            reader = self.readers[length]
            rows = len(reader.state.position)
            for first in range(0, len(slots), rows):
                some = slots[first:first + rows]
                some_prompts = [prompts[slot] for slot in some]
                yield some, self.run_together(reader, some, some_prompts)

    def segment_length(self, prompt_length):
        """Tokens per segment for a prompt. It depends only on the length of the prompt."""
        state = self.decoder.state
        if not state.pads_segments:
            return state.segment_length
        length = min(SHORTEST_SEGMENT, state.segment_length)
        while length < min(prompt_length, state.segment_length):
            length *= 2
        return length

    def new_reader(self, segment_length):
        """A reader for prompts with segments of this length."""
        decoder = self.decoder
        state = decoder.state
        slots = len(state.position)
        rows = max(1, min(slots, state.segment_length // segment_length))
        length = state.length
        if segment_length < state.segment_length:
            length = min(length, segment_length + state.tokens_per_forward)
        elif slots == 1:
            return Reader(state, decoder.cache)  # prefill directly in the decoder's state
        else:
            rows = 1
        new_state = DecodeState(decoder.target, rows, length, state.tokens_per_forward)
        new_state.segment_length = segment_length
        new_state.pads_segments = state.pads_segments
        cache = None
        if decoder.drafter is not None:
            cache = decoder.drafter.new_cache(rows, length)
        return Reader(new_state, cache)

    def run_together(self, reader, slots, prompts):
        """Prefill at most as many prompts as the reader has rows. Returns their last logits."""
        decoder = self.decoder
        state = reader.state
        rows = list(range(len(prompts)))
        unused = len(state.position) - len(prompts)
        padding = prompts[:1] * unused

        def run_graph(name, function, *inputs):  # each reader has its own graphs
            name = (state.segment_length, name)
            return decoder.graphs.run(name, function, *inputs)

        features, logits = prefill(
            decoder.target, prompts + padding, state, decoder.layer_ids, run_graph)
        if state is not decoder.state:
            decoder.state.put(slots, state, rows)
        if decoder.drafter is not None:
            self.write_context(reader, features, slots, rows)
        return logits[rows]

    def write_context(self, reader, features, slots, rows):
        """Write the features of prompts into the drafter's cache.

        The rest of the cache becomes 0. Otherwise a NaN of an earlier sequence would spread.
        """
        decoder = self.decoder
        length = reader.state.length
        start = torch.zeros_like(reader.state.position)
        for keys, values in reader.cache:
            keys.zero_()
            values.zero_()
        if features is not None:  # some drafters use no features
            features = features[:, :length]
        decoder.drafter.write_context(features, reader.cache, start)
        if reader.cache is decoder.cache:
            return
        for buffers, new_buffers in zip(decoder.cache, reader.cache):
            for buffer, new in zip(buffers, new_buffers):
                buffer[slots] = 0
                buffer[slots, :, :length] = new[rows]
