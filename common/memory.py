"""The memory ledger: what a training step holds, measured in bytes, beside what the configuration
predicts.
"""

import resource
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext

import torch

# private API: the only exact byte counter on a CPU
from torch.distributed._tools.mem_tracker import MemTracker

GIB = 2**30


def _local(tensor):
    """This rank's part of a sharded tensor (DTensor); the tensor itself otherwise."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _bytes(tensors):
    return sum(_local(t).numel() * t.element_size() for t in tensors)


def _gather_buffer_bytes(model):
    """What FSDP2's latest gather came in: it lives until the next one."""
    if not hasattr(model, "_get_fsdp_state"):
        return 0
    latest = model._get_fsdp_state()._comm_ctx.all_gather_state
    return latest.all_gather_result.all_gather_output.untyped_storage().nbytes() if latest else 0


class ByteCounter(MemTracker):
    """MemTracker without its statistics of each module: the same bytes, in a tenth of the time.

    Those also refuse a second forward in one step, and leave callbacks behind where no backward follows.
    Autograd adds up gradients in place, except where a dispatch mode like this one looks on: the peak leaves
    out the old sum, which is freed at once.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        self.adds_up = in_backward and func is torch.ops.aten.add.Tensor
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _update_peak_stats(self, peak_state):
        if not self.adds_up:
            super()._update_peak_stats(peak_state)

    def _pre_fw_hook(self, *_):
        pass

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

    def peak_bytes(self, device):
        return self._peak_mem[device]


class MemoryMeter:
    """Measures training steps: on CUDA every step, from the allocator's statistics; on a CPU one step, by
    MemTracker.

    Args:    model, optimizer; device: where the model runs; track: count on a CPU as well (slows that step).
             track_step: which call of `step` MemTracker watches; the second one finds the optimizer's state
             there. offload: an OffloadActivations, for on_host: bytes that waited on the host at once.
             others: further models that run in a step, frozen ones.
    After:   measured: the most that any measured step held: parameters, gradients, optimizer, activations
             (held when the loss head starts), loss_head (its own peak beyond that) and peak, in bytes of
             this rank; empty if nothing was measured.
    """

    def __init__(self, model, optimizer, device, track=False, track_step=2, offload=None, others=()):
        self.model, self.optimizer, self.device, self.offload = model, optimizer, device, offload
        self.track, self.track_step, self.calls = track and device.type == "cpu", track_step, 0
        self.others = list(others)
        self.measured = {}
        self.largest_batch = None  # of the measured steps; of all steps if none was measured
        self.counting = False  # whether MemTracker watched the latest step
        self.tracker = None

    @contextmanager
    def step(self, batches):
        """Wrap one optimizer step: forwards, backwards and update; batches: its inputs, dicts of tensors.

        A step without any batch computes nothing: it is not measured, and not counted.
        """
        if not batches:
            self.counting = False
            yield
            return
        self.calls += 1
        tracked = self.counting = self.track and self.calls == self.track_step
        if tracked:
            self.largest_batch = None
        if tracked or not self.track or self.calls < self.track_step:
            seen = batches if self.largest_batch is None else [self.largest_batch, *batches]
            self.largest_batch = max(seen, key=lambda batch: batch["input_ids"].numel())
        if self.device.type != "cuda" and not tracked:
            yield
            return
        if tracked:
            self.tracker = ByteCounter()
            tensors = [v for batch in batches for v in batch.values() if torch.is_tensor(v)]
            self.tracker.track_external(self.model, *self.others, self.optimizer, *tensors)
        now = {"activations": 0, "loss_head": 0, "peak": 0}
        start = {}

        def forward_starts(*_):  # by now FSDP has gathered the outer weights: they are no activations
            start["forward"] = self._allocated() - _gather_buffer_bytes(self.model)

        def head_starts(*_):
            now["peak"] = max(now["peak"], self._peak())
            start["head"] = self._reset_peak()
            held = start["head"] - _gather_buffer_bytes(self.model)
            now["activations"] = max(now["activations"], held - start["forward"])

        def head_ends(*_):
            now["loss_head"] = max(now["loss_head"], self._peak() - start["head"])

        def update_starts(*_):
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            now["gradients"] = _bytes(gradients)

        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        hooks = [
            embedding.register_forward_pre_hook(forward_starts),
            head.register_forward_pre_hook(head_starts),
            head.register_forward_hook(head_ends),
            self.optimizer.register_step_pre_hook(update_starts),
        ]
        try:
            with self.tracker or nullcontext():
                self._reset_peak()
                yield
                now["peak"] = max(now["peak"], self._peak())
        finally:
            for hook in hooks:
                hook.remove()
            self.tracker = None
        states = [v for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        if self.offload is not None:
            now["on_host"] = self.offload.step_host_bytes
        self.measured = {
            "parameters": _bytes(self.model.parameters()),
            **({"reference": _bytes(p for m in self.others for p in m.parameters())} if self.others else {}),
            "gradients": now.pop("gradients"),
            "optimizer": _bytes(states),
            **{name: max(count, self.measured.get(name, 0)) for name, count in now.items()},
        }

    def peak_bytes(self):
        """Highest so far: on CUDA allocated by tensors, on a CPU resident in the process."""
        if self.device.type == "cuda" and self.measured:
            return self.measured["peak"]
        return peak_memory_bytes(self.device)

    def _allocated(self):
        if self.tracker is None:
            return torch.cuda.memory_allocated(self.device)
        return self.tracker.get_tracker_snapshot("current")[self.device]["Total"]

    def _peak(self):
        if self.tracker is None:
            return torch.cuda.max_memory_allocated(self.device)
        return self.tracker.peak_bytes(self.device)

    def _reset_peak(self):
        """Forget the peak so far; returns the bytes allocated now."""
        if self.tracker is None:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.tracker._peak_mem[self.device] = self._allocated()
        return self._allocated()


def predict_ledger(
    config,
    num_tokens,
    num_scored,
    *,
    num_parameters,
    num_trained=None,
    gradient_checkpointing,
    bf16,
    chunk_size,
    rows=1,
    masked=False,
    accumulates=False,
    offload_min_bytes=None,
    world=1,
    num_keys=None,
    num_masked=0,
    head_recomputes=False,
    num_frozen=0,
):
    """What one step of a Llama-like decoder (rotary, RMSNorm, gated MLP) will hold, from its configuration
    alone.

    Args:    config: a transformers configuration. num_tokens, num_scored: of the largest forward, padding
             included. num_parameters: tied weights counted once; num_trained: of them, None = all; otherwise
             activations and peak are upper bounds. rows: of a padded batch, 1 for a flat row; masked: whether
             it holds any padding. accumulates: whether a step has several forwards.
             offload_min_bytes: with offloading, storages from this size on wait on the host (offload.py).
             num_keys: tokens that serve as keys, where shared prompts repeat some; num_masked: elements of
             the masks that SDPA is given segment by segment. head_recomputes: the loss head makes its logits
             again in backward (token_logps) instead of its gradient in forward (nll_sum). num_frozen:
             parameters of further models.
    Returns: {name: (formula, bytes)} for one rank, in the ledger's order; {} for other architectures.
    """
    needs = ("hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps", "num_key_value_heads")
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    # a model with a text model inside has other parts as well, which nothing here counts
    known = config.get_text_config() is config and all(hasattr(config, name) for name in needs)
    if not known or any(getattr(config, name, None) for name in experts):
        return {}
    h, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    vocabulary = config.vocab_size
    head_dim = getattr(config, "head_dim", None) or h // config.num_attention_heads
    q = config.num_attention_heads * head_dim
    # a mask makes SDPA repeat keys and values for each query head
    kv = q if masked else config.num_key_value_heads * head_dim
    mask = num_tokens * (num_tokens // rows) if masked else 0  # B T T elements
    c = 2 if bf16 else 4  # bytes of an activation
    head_weight = vocabulary * h
    in_layers = num_parameters - head_weight * (1 if config.tie_word_embeddings else 2)

    # Saved by one layer for each token. Norms compute in fp32: in bf16 they keep an fp32 copy of their input.
    norms = 2 * (8 * h if bf16 else 12 * h)  # input, normalised, scaled
    joined = q if rows == 1 else 0  # a flat row's documents are joined after attention: a copy of its output
    attention = c * (2 * q + joined)  # q, output
    keys = c * 2 * kv * (num_keys or num_tokens)  # k, v
    mlp = c * 4 * inner  # gate, silu(gate), up, their product
    masks = c * (mask + num_masked)  # added as numbers
    one_layer = num_tokens * (norms + attention + mlp) + keys + masks
    # the last norm, the rotary cosines and sines, the mask as booleans
    outside = num_tokens * norms // 2 + 2 * c * head_dim * num_tokens // rows + mask
    if gradient_checkpointing:
        formula, kept = f"layer inputs {c} N h L", num_tokens * c * h
        recomputed = one_layer
    else:
        checkpointed = format_gib(num_tokens * c * h * layers + outside).strip()
        formula, kept = f"all L layers (with checkpointing: {checkpointed})", one_layer
        recomputed = 0
    activations, prefetched, host = layers * kept + outside, 0, {}
    if offload_min_bytes is not None and kept >= offload_min_bytes:
        formula = f"of one layer (of all L: {format_gib(activations).strip()})"
        activations, prefetched = kept + outside, kept
        host = {"on_host": ("activations of L - 1 layers", (layers - 1) * kept)}
    logits = 4 * num_scored * vocabulary
    hidden = num_scored * h * c  # of the scored tokens; as much again for their gradient
    chunk = min(chunk_size, num_scored) * vocabulary * (6 if bf16 else 4)
    # the weight's gradient is summed up in fp32, and then cast
    in_chunks = chunk + min(chunk_size, num_scored) * h * c
    head_backward = 2 * hidden + 4 * head_weight + max(in_chunks, c * head_weight if bf16 else 0)
    loss_head = hidden + chunk if head_recomputes else head_backward

    num_trained = num_parameters if num_trained is None else num_trained
    states = (4 * num_parameters + 8 * num_trained + 4 * num_frozen) // world
    gradients = 4 * num_trained // world
    sharded = bf16 or world > 1
    # FSDP gathers what lies outside the layers for the whole step, and two layers at a time (one is
    # prefetched)
    gathered = c * ((num_parameters - in_layers) + 2 * in_layers // layers) if sharded else 0
    before = states + gathered + (gradients if accumulates else 0)
    at_head = before + activations + head_backward
    # the last layer's backward: everything is still there, plus the gradients that flow
    flowing = c * head_weight + c * num_tokens * (h + inner)
    if sharded:  # one layer's gradient: as computed, in fp32 for the reduce-scatter, and this rank's part
        flowing += (c + 4 + 4 // world) * in_layers // layers
    in_last = before + activations + prefetched + recomputed + flowing
    # the first layer's backward: the other layers' activations are gone, their gradients are there
    own = in_layers // layers if sharded else 0  # in `flowing`
    others = 0 if accumulates else min(4 * (in_layers - own) // world, gradients)
    in_first = before + others + outside + (recomputed or kept) + flowing
    # the second layer's: the first one's activations are back from the host, its gradient is not there
    in_second = in_first - others // layers + prefetched
    # the embedding's backward: a gradient of V * h of its own, and the head's, to which it is added if tied
    extra = (1 if config.tie_word_embeddings else 0) + (1 if accumulates else 0)
    at_end = states + gradients + c * head_weight * extra
    if sharded:  # both are whole until all are there; then fp32 copies of them become this rank's part
        outer = num_parameters - in_layers
        reduced = 4 * outer + max(c * outer, 4 * outer // world)
        at_end = (
            states + min(4 * in_layers // world, gradients) + max(gathered + 2 * c * head_weight, reduced)
        )
        at_end += 4 * outer // world if accumulates else 0
    moments = {
        "at the loss head": at_head,
        "in the last layer's backward": in_last,
        "in the second layer's backward": in_second,
        "in the first layer's backward": in_first,
        "in the embedding's backward": at_end,
    }
    head_formula = "chunk x V" + ("" if head_recomputes else " + 4 V h")
    share = (" trained P" if num_trained < num_parameters else " P") + (" / W" if world > 1 else "")
    frozen = {"reference": ("fp32   4 P" + (" / W" if world > 1 else ""), 4 * num_frozen // world)}
    return {
        "parameters": ("fp32   4 P" + (" / W" if world > 1 else ""), 4 * num_parameters // world),
        **(frozen if num_frozen else {}),
        "gradients": (f"fp32   4{share}", gradients),
        "optimizer": (f"AdamW  8{share}", 8 * num_trained // world),
        "activations": (formula, activations),
        "loss_head": (f"{head_formula} (all at once: {format_gib(logits).strip()})", loss_head),
        "peak": (max(moments, key=moments.get), max(moments.values())),
        **host,
    }


def format_gib(count):
    """Bytes as GiB, with enough digits for a model of a few megabytes."""
    if count is None:
        return f"{'-':>10}"
    return f"{count / GIB:10.2f}" if count >= GIB / 10 else f"{count / GIB:10.4f}"


def memory_ledger(predicted, measured):
    """Join the two sides into rows: dicts with name, formula, predicted and measured (bytes, or None)."""
    names = [*predicted, *(name for name in measured if name not in predicted)]
    return [
        {
            "name": name,
            "formula": predicted[name][0] if name in predicted else "",
            "predicted": predicted[name][1] if name in predicted else None,
            "measured": measured.get(name),
        }
        for name in names
    ]


def format_ledger(title, rows):
    """The table that a run ends with."""
    if not rows:
        return f"memory ledger  {title}: not predicted for this model, and not measured"
    lines = [f"memory ledger  {title:<52}  predicted   measured   (GiB)"]
    for row in rows:
        name = row["name"].replace("_", " ")
        lines.append(
            f"{name:<16}{row['formula']:<51}{format_gib(row['predicted'])} {format_gib(row['measured'])}"
        )
    if any(row["formula"] for row in rows):
        lines.append("P parameters, N tokens of a forward, h hidden size, L layers, V vocabulary, W ranks")
    return "\n".join(lines)


def peak_memory_bytes(device):
    """Highest so far: on CUDA allocated by tensors, on a CPU resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_bandwidth(device, num_bytes=2**26, repetitions=5):
    """Bytes per second to the host and back, over pinned memory; without CUDA, within the host's memory."""
    on_device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    on_host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    synchronize = torch.get_device_module(device).synchronize

    def measure(destination, source):
        seconds = []
        for _ in range(repetitions):
            synchronize()
            start = time.perf_counter()
            destination.copy_(source, non_blocking=True)
            synchronize()
            seconds.append(time.perf_counter() - start)
        return num_bytes / statistics.median(seconds)

    return {"to_host": measure(on_host, on_device), "to_device": measure(on_device, on_host)}


def traffic(report, bandwidth):
    """Whether offloading hides: a layer's bytes over the bandwidth, against the layer's forward.

    Forward is the tighter side: backward computes at least twice as long over the same bytes.

    Args:    report: OffloadActivations.report(); bandwidth: measure_bandwidth(device). On the pretend device,
             where the same processor copies and computes, nothing hides, and no bandwidth is asked for.
    Returns: the report with bytes_per_second, copy_seconds_per_layer and hides (None on the pretend device).
    """
    if report["pretend"]:
        return {**report, "bytes_per_second": None, "copy_seconds_per_layer": None, "hides": None}
    copy_seconds = report["bytes_per_layer"] / bandwidth["to_host"]
    hides = copy_seconds <= report["layer_seconds"]
    return {**report, "bytes_per_second": bandwidth, "copy_seconds_per_layer": copy_seconds, "hides": hides}


def format_traffic(traffic):
    """Lines under the ledger: what the first rank moved, what stayed and why, whether the copies hide."""

    def mib(count):
        return f"{count / 2**20:.2f}"

    stayed = ", ".join(f"{reason} {mib(count)}" for reason, count in traffic["stayed_bytes"].items())
    lines = [f"offloading   {mib(traffic['offloaded_bytes'])} MiB of a forward moved; {stayed} stayed"]
    if traffic["offloaded_bytes"] == 0:
        lines.append("nothing moved: rows this short save nothing that is worth a copy")
    elif traffic["pretend"]:
        lines.append("on a pretend device: host memory on both sides, so nothing is saved here")
    else:
        copy, layer = traffic["copy_seconds_per_layer"] * 1000, traffic["layer_seconds"] * 1000
        lines.append(
            f"a layer's {mib(traffic['bytes_per_layer'])} MiB at "
            f"{traffic['bytes_per_second']['to_host'] / 1e9:.1f} GB/s take {copy:.2f} ms, its forward takes "
            f"{layer:.2f} ms: the copies {'hide' if traffic['hides'] else 'do not hide'}"
        )
    return f"\n{'':13}".join(lines)
